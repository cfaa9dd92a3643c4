"""Devices by name."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist.errors import UserError
from resist.planning.strategy import resist
from resist.training.device import naming_nondeterminism, pick_device, take_device
from resist.training.loop import Training


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="`device='tpu'` is not one of"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            pick_device("cuda")


@pytest.mark.parametrize("fixed", [True, False])
def test_a_process_takes_its_own_gpu_and_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    """Otherwise threads of torch open a context on the first GPU."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert take_device("auto", fixed_shapes=fixed) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert torch.backends.cudnn.benchmark == fixed


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"cuda:0 cannot be used: .* busy or unavailable; choose another by CUDA_VIS"):
        take_device("cuda")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    take_device("cpu", deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    take_device("cuda", fixed_shapes=True, deterministic=True)
    assert not torch.backends.cudnn.benchmark


def test_an_operation_without_a_deterministic_algorithm_is_named(deterministic: None) -> None:
    reason = "`deterministic=true`: put_ does not have a deterministic implementation; remove it"
    with pytest.raises(UserError, match=reason), naming_nondeterminism():
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
    with pytest.raises(RuntimeError, match="size of tensor"), naming_nondeterminism():
        torch.add(torch.zeros(3), torch.zeros(2))


def test_it_ends_the_round_in_all_processes(deterministic: None) -> None:
    """As an image that cannot be read does."""

    def step(step: int, lr: float) -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([step]), torch.ones(1)).sum()

    job = SimpleNamespace(step_seed=lambda worker: worker, round=0, strategy=resist(1, 2))
    training: Any = SimpleNamespace(
        failed=None,
        evaluation=SimpleNamespace(failed=None),
        trainers=[SimpleNamespace(index=0, step=step)],
        job=job,
        device=torch.device("cpu"),
    )
    assert Training._step(training, 1, 0.1).isnan().all()
    assert training.failed.startswith("`deterministic=true`: put_ does not have")
