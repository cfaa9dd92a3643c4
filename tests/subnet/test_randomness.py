"""Random draws on GPUs by the number of the GPU, whatever the current one is; no GPU is needed here."""

import pytest
import torch
from torch import nn

from resist.subnet.randomness import seeded_gpus, seeded_rng, step_seed
from resist.subnet.seeded import build_seeded
from two_gpus import Gpus


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


def test_a_step_seeds_the_gpu_of_the_network(gpus: Gpus) -> None:
    """Dropout on the second GPU is a function of (seed, worker, step), and nothing else draws differently after it."""
    gpus.seeds[:] = [5, 6]
    for worker in range(2):
        for step in (3, 3, 4):
            with seeded_rng(step_seed(0, worker, step), torch.device("cuda:1")):
                assert gpus.seeds == [5, step_seed(0, worker, step)]
            assert gpus.seeds == [5, 6]
    assert len({step_seed(0, worker, step) for worker in range(2) for step in (3, 4)}) == 4


def test_a_gpu_without_a_number_is_the_current_one(gpus: Gpus) -> None:
    with seeded_gpus(7, [torch.device("cuda")]):
        assert gpus.seeds == [7, 0]


def test_weights_that_are_drawn_on_a_gpu_are_seeded(gpus: Gpus) -> None:
    drawn: list[list[int]] = []

    def build() -> nn.Module:
        drawn.append(list(gpus.seeds))
        return nn.Linear(2, 2)

    build_seeded(build, 9)
    assert drawn == [[9, 9]]
    assert gpus.seeds == [0, 0]


def test_also_if_the_network_is_the_first_that_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, drawn = Gpus(monkeypatch, in_use=False), list[list[int]]()

    def build() -> nn.Module:
        drawn.append(list(gpus.seeds))
        gpus.in_use = True
        return nn.Linear(2, 2)

    build_seeded(build, 9)
    assert drawn == [[0, 0], [9, 9]]


def test_a_process_that_uses_no_gpu_begins_to_use_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, in_use=False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("CUDA was initialized"))
    build_seeded(lambda: nn.Linear(2, 2), 9)
    assert gpus.seeds == [0, 0]


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_network_is_built_on_the_cpu_whatever_the_default_device_is(default: str) -> None:
    with torch.device(default):
        (weight, bias) = build_seeded(lambda: nn.Linear(2, 2), 3).parameters()
        (same, _) = build_seeded(lambda: nn.Linear(2, 2), 3, "cpu").parameters()
        (meta, _) = build_seeded(lambda: nn.Linear(2, 2), 3, "meta").parameters()
    assert torch.equal(weight, same)
    assert bias.device.type == "cpu"
    assert meta.is_meta
