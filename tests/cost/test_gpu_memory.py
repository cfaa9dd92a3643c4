"""Memory of a GPU: what is counted beside a training step, and how workers share it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_cases import SMALL
from torch import nn
from torch.optim import Optimizer

from resist.cli import main
from resist.cost import GpuSettings, predict
from resist.cost.footprint import Memory, measure, sgd
from resist.cost.gpu import COMMUNICATOR_BYTES, CONTEXT_BYTES, as_on_gpu, built_on_gpu, gpu_memory
from resist.cost.states import StateMeter
from resist.data import Images, device_bytes
from resist.planning.strategy import ddp, resist
from resist.runs.config import NetworkConfig
from resist.tasks import Classification, largest_test_batch, open_task
from support import tiny

OPTIMIZERS: dict[str, Any] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}


def memory(kept: int, step: int) -> Memory:
    return Memory(weights=kept - 3, gradients=0, optimizer=2, average=1, activations=step, peak=kept + step)


def test_a_process_keeps_all_of_its_workers_and_trains_one_at_a_time() -> None:
    memories = [memory(10, 5), memory(20, 7), memory(30, 1)]
    alone = gpu_memory(memories, GpuSettings(processes=1, data_bytes=4), test=100)
    assert (alone.workers, alone.training, alone.test) == (3, 60 + 7, 60 + 100)
    assert alone.communicator == 0
    assert alone.total == 160 + CONTEXT_BYTES + 4
    each = gpu_memory(memories, GpuSettings(), test=0)  # the third needs most, and others test
    assert (each.workers, each.training, each.test, each.data) == (1, 31, 0, 0)
    assert each.total == 31 + CONTEXT_BYTES + COMMUNICATOR_BYTES
    two = gpu_memory(memories, GpuSettings(processes=2), test=30)  # workers 1 and 2 on the second
    assert (two.workers, two.training, two.test) == (2, 50 + 7, 0)
    assert gpu_memory(memories, GpuSettings(processes=8), test=0) == each


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"SparseAdam", "LBFGS"}))
def test_every_optimizer_takes_the_step_of_a_gpu_without_one(name: str) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2, device="meta")) for _ in range(2)]
    optimizer = as_on_gpu(OPTIMIZERS[name](parameters))
    together = "foreach" in optimizer.defaults and name != "Adafactor"
    assert [group.get("foreach") for group in optimizer.param_groups] == [together or None]
    meter = StateMeter(built_on_gpu(OPTIMIZERS[name]))
    assert meter.num_bytes(parameters) == StateMeter(OPTIMIZERS[name]).num_bytes(parameters)


def test_what_the_user_has_chosen_stays() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2))]
    for options in ({"foreach": False}, {"fused": True}):
        (group,) = as_on_gpu(torch.optim.SGD(parameters, lr=0.1, **options)).param_groups  # type: ignore[arg-type]
        assert not group["foreach"]


@pytest.mark.slow
def test_temporary_tensors_of_all_gradients_are_counted() -> None:
    """One image: activations are small, so that the peak is in the optimizer's step."""
    template, options = tiny(), {"batch_size": 1, "image_shape": (3, 16, 16)}
    before = measure(template, (), (), build_optimizer=sgd, **options).memory  # type: ignore[arg-type]
    on_gpu = measure(template, (), (), build_optimizer=built_on_gpu(sgd), **options).memory  # type: ignore[arg-type]
    assert before.peak + 0.7 * before.gradients <= on_gpu.peak <= before.peak + 1.1 * before.gradients
    assert replace(on_gpu, peak=0) == replace(before, peak=0)


@pytest.mark.slow
def test_a_prediction_has_it_in_each_row_and_only_where_it_is_wanted() -> None:
    report = predict(tiny, [resist(2), ddp(2)], gpu=GpuSettings(processes=1, test_batch=8), **SMALL)
    assert [row.gpu.workers for row in report.rows if row.gpu] == [2, 1]  # DDP has a process for each worker
    data = report.to_json()
    for row, one in zip(report.rows, data["strategies"], strict=True):
        assert row.gpu is not None
        assert one["gpu_bytes"]["total"] == row.gpu.total
        assert row.gpu.test > 2 * report.full.memory.weights + row.networks[0].memory.kept
    assert "not measured on a GPU" in data["assumptions"][0]
    without = predict(tiny, [resist(2)], **SMALL)
    assert without.rows[0].gpu is None
    assert without.to_json()["assumptions"] == []


@pytest.mark.parametrize("name", [pytest.param("digits", marks=pytest.mark.slow), "synthetic"])
def test_data_and_batches_are_those_of_the_task(name: str) -> None:
    config = NetworkConfig(data=name)
    task = open_task(config)
    assert isinstance(task, Classification)
    parts = [images for images in (task.train, task.held_out) if isinstance(images, Images)]
    assert device_bytes(name) == sum(part.images.nbytes + part.labels.nbytes for part in parts)
    assert largest_test_batch(config) == task.test_images[2]


def test_streamed_data_take_no_memory_of_a_gpu() -> None:
    assert device_bytes("folder") == device_bytes("voc2007") == 0
    assert largest_test_batch(NetworkConfig(data="voc2007")) == 8
    assert largest_test_batch(NetworkConfig(data="folder")) == 100


@pytest.mark.slow
def test_the_command_needs_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    network = {"data": "digits", "model_args": ["depths=1,1,5,1", "width=4"]}
    file.write_text(json.dumps({"network": network, "machine": {"processes": 2}}))
    with pytest.raises(SystemExit) as ended:
        main(["cost", "--config", str(file), "--device", "cuda", "--workers", "4", "--strategies", "resist", "--json"])
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    (row,) = json.loads(out.out)["strategies"]
    assert row["gpu_bytes"]["workers"] == 2
    assert row["gpu_bytes"]["data"] == device_bytes("digits")
    with pytest.raises(SystemExit):
        main(["cost", "--config", str(file), "--device", "cpu", "--workers", "4", "--strategies", "local_sgd"])
    assert "--processes has no effect without --device cuda." in capsys.readouterr().out
