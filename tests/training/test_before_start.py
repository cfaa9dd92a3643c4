"""What is refused before any process is started: options that contradict each other, too little data or memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from resist.cli import train as command
from resist.errors import UserError
from resist.runs.config import MachineConfig, MethodConfig, NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.training import preflight
from resist.training.preflight import check_memory, check_options
from resist.training.train import open_data, train

CPU = torch.device("cpu")
SMALL = TrainConfig(
    NetworkConfig(model_args=("depths=1,1,5,1", "width=8")),
    MethodConfig(workers=2, min_depth=0),
    machine=MachineConfig(device="cpu", processes=2),
)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> int:
        raise AssertionError("a process was started")

    monkeypatch.setattr(command, "launch", started)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimization": OptimizationConfig(batch_size=100_000)}, r"`batch_size=100000` is outside 1 to 1437, the"),
        ({"method": MethodConfig(workers=2, strategy="ddp"), "machine": MachineConfig(processes=1)},
         r"`strategy=ddp` runs one worker in each process, and there would be 1 for 2 workers; start 2"),
        ({"network": NetworkConfig(chain=("nosuch",))}, "'nosuch' has no run of residual blocks; found"),
        ({"network": NetworkConfig(model="torchvision:resnet18", chain=("nosuch:0-1",))},
         "`chain=nosuch:0-1`: the network has no module of that name; it has conv1, bn1"),
        ({"machine": MachineConfig(device="tpu")}, "`device='tpu'` is not one of"),
    ],
    ids=["batch", "ddp", "chain", "chain of another library", "device"],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_starts")
def test_it_is_refused_in_the_launcher(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = replace(SMALL, run=RunConfig(out=tmp_path / "run"), **changes)
    with pytest.raises(UserError, match=expected):
        command.start(config)
    assert not (tmp_path / "run").exists()


def test_a_process_of_torchrun_gives_its_reason_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []

    def connect(*_: object, failure: str, backend: str) -> None:
        reasons.append(failure)
        raise KeyboardInterrupt

    monkeypatch.setattr("resist.training.train.connect", connect)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, checked=False)
    with pytest.raises(KeyboardInterrupt):
        train(replace(SMALL, machine=MachineConfig(device="tpu")), checked=False)
    assert reasons[0] == "3 processes for 2 workers; start at most one process for each worker"
    assert reasons[1].startswith("`device='tpu'`")


def test_what_is_beyond_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.total_bytes(CPU) > 1e8
    check_memory(10**6, CPU, 2)
    monkeypatch.setattr(preflight, "total_bytes", lambda _: 10**6)
    with pytest.raises(UserError, match=r"state of 2 workers need at least .*, and this machine has 1\.0 MB of memory"):
        check_options(SMALL, CPU, 2, range(2))
    monkeypatch.setattr(preflight, "total_bytes", lambda _: 10**9)
    check_options(SMALL, CPU, 2, range(2))


def test_there_are_images_enough() -> None:
    preflight.check_task(SMALL, open_data(SMALL))
