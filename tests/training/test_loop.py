import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from resist.data import load
from resist.errors import AgreedError, UserError
from resist.models import build
from resist.runs.config import NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.config_file import read_config
from resist.runs.directory import Run, check_free
from resist.runs.model_file import load_full, save_full
from resist.subnet.chains import choose_chains
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.scaling import scale_branches
from resist.sync.agreement import run_everywhere
from resist.sync.local import Local
from resist.sync.worker import Worker
from resist.tasks import Classification, network_builder
from resist.training.device import pick_device
from resist.training.lr_schedule import evaluation_rounds, num_steps, rate
from resist.training.trainer import Trainer, make_sampler


def test_step_schedule_is_the_papers() -> None:
    config = OptimizationConfig(lr=1.0, lr_schedule="step")
    rates = [rate(config, step, 8) for step in range(8)]
    assert rates == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_cosine_falls_from_the_full_rate_to_nothing() -> None:
    config = OptimizationConfig(lr=2.0, lr_schedule="cosine", lr_warmup_steps=4)
    rates = [rate(config, step, 104) for step in range(104)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.001


def test_the_number_of_steps_covers_the_epochs() -> None:
    assert num_steps(OptimizationConfig(epochs=40, batch_size=128), 50000) == math.ceil(40 * 50000 / 128)
    assert num_steps(OptimizationConfig(epochs=0.001, batch_size=128), 50000) == 1


@pytest.mark.parametrize(("rounds", "times"), [(1, 10), (7, 3), (10, 10), (313, 10), (3, 5)])
def test_evaluations_are_spread_and_the_last_is_at_the_end(rounds: int, times: int) -> None:
    tested = evaluation_rounds(rounds, times)
    assert max(tested) == rounds
    assert min(tested) >= 1
    assert len(tested) == min(rounds, times)


class Mean(nn.Module):
    """Scores that are linear in the image, so that gradients add up exactly as the theory says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        self.head = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    task = Classification(Mean, *load("digits"))
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = Mean()
        subnet = Subnet(model, (), ())
        subnet.load(tensors_of(model), ())
        config = TrainConfig(optimization=OptimizationConfig(batch_size=32, grad_accum_steps=parts))
        trainer = Trainer(config, Worker(0, subnet), task, make_sampler(config, task.num_images, worker=0))
        loss = [float(trainer.step(step, 0.1)) for step in range(3)]
        weights.append((loss, subnet.flat.clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    torch.testing.assert_close(weights[0][1], weights[1][1])


def test_an_error_of_one_process_reaches_all_as_the_same_error() -> None:
    class TwoProcesses(Local):
        num_processes = 2

        def all_gather_text(self, text: str) -> list[str]:
            return [text, "the disk of the other one is full"]

    with pytest.raises(AgreedError, match=r"the disk of the other one is full \(process 1\)"):
        run_everywhere(TwoProcesses(2), lambda: None)
    with pytest.raises(AgreedError, match="here"):
        run_everywhere(Local(1), failing)
    assert run_everywhere(Local(1), lambda: 3) == 3


def failing() -> None:
    raise UserError("here")


def test_the_data_digest_sees_a_single_label() -> None:
    task = Classification(Mean, *load("digits"))
    before = task.digest()
    task.train.labels[7] += 1
    assert task.digest() != before


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="`device='tpu'` is not one of"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            pick_device("cuda")


def test_a_run_directory_brings_its_configuration_back_and_is_never_overwritten(tmp_path) -> None:
    config = TrainConfig(network=NetworkConfig(model_args=("width=8",)), run=RunConfig(out=tmp_path / "a" / "b"))
    run = Run(tmp_path / "a" / "b", config)
    run.append({"round": 1})
    assert read_config(run.path) == config
    assert (run.path / "metrics.jsonl").read_text() == '{"round": 1}\n'
    run.close()
    with pytest.raises(UserError, match="never overwritten"):
        Run(run.path, config)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        (tmp_path / "file" / "run", r"file is not a directory that you may write to"),
        (tmp_path / ("x" * 300) / "run", r"cannot be made: File name too long"),
        (tmp_path / "link", r"exists already and is never overwritten"),
    ):
        with pytest.raises(UserError, match=message):
            check_free(out)
    check_free(tmp_path / "b" / "c" / "d")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs a file system that refuses new folders")
def test_an_out_below_a_missing_folder_where_none_can_be_made_is_found_by_the_check() -> None:
    with pytest.raises(UserError, match=r"cannot be made: /proc is not a directory that you may write to \(.*\)"):
        check_free(Path("/proc/none/run"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"network": 3}', '{"network": {"data": 3}}', '{"more": {}}', "\x00"])
def test_damaged_configurations_are_named(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def saved(tmp_path) -> tuple[nn.Module, object]:
    model = build("preact_small", num_classes=10, width=4).eval()
    chains = choose_chains(model)
    save_full(model, chains, [0.5], tmp_path / "model.safetensors")
    return model, chains


def test_a_saved_network_comes_back_scaled(tmp_path) -> None:
    model, chains = saved(tmp_path)
    with torch.device("meta"):
        again = network_builder(NetworkConfig(model_args=("width=4",)))()
    load_full(again, chains, tmp_path / "model.safetensors").eval()
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), again(images))
    scale_branches(model, chains, [0.5])
    assert torch.equal(model(images), again(images))


def test_damaged_and_foreign_weights_are_refused_in_one_line(tmp_path) -> None:
    model, chains = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged") as caught:
            load_full(build("preact_small", num_classes=10, width=4), chains, file)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    with pytest.raises(UserError, match="another network"):
        load_full(build("preact_small", num_classes=11, width=4), chains, file)
    with pytest.raises(UserError, match="the run has not finished"):
        load_full(model, chains, tmp_path / "none")
