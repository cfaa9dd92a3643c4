"""save_checkpoint and load_checkpoint in one's own loop: in any hosting, with whatever else the loop has."""

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import resist
from pool import Pool
from resist.errors import AgreedError, UserError
from resist.runs.saved import FORMAT, complete
from resist.runs.tensor_file import read_description, read_tensors, write_tensors
from saving import IN_FILES, OPTIMIZERS, STEPS, Loop, equal, warmed_up

pytestmark = pytest.mark.slow


class Sampler:
    """Of a user: it has a state, with a tensor in it."""

    def __init__(self) -> None:
        self.order, self.position = torch.randperm(10), 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]


def uninterrupted_and_resumed(folder: Path, optimizer: str, workers: int = 3) -> bool:
    """Eight steps; and eight with a new job after every second, whose schedules come back through `extra`."""
    make = OPTIMIZERS[optimizer]
    whole = Loop(warmed_up(workers), make, averaged=True).train(8)
    for _ in range(4):
        loop = Loop(warmed_up(workers), make, averaged=True)
        resist.load_checkpoint(folder, loop.job, loop.optimizers, extra={"schedules": loop.schedules}, missing_ok=True)
        loop.train(2)
        resist.save_checkpoint(folder, loop.job, extra={"schedules": loop.schedules})
    return equal(whole.everything(), loop.everything())


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=() if name in IN_FILES else pytest.mark.nightly) for name in OPTIMIZERS]
)
def test_four_interruptions_change_nothing(optimizer: str, tmp_path: Path) -> None:
    assert uninterrupted_and_resumed(tmp_path / "new", optimizer)
    assert [path.name for path in complete(tmp_path / "new")] == ["round-000004", "round-000003"]


@pytest.mark.parametrize(
    "optimizer", ["two", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("sgd", "adafactor", "python"))]
)
def test_four_interruptions_in_two_processes(optimizer: str, pool: Pool, tmp_path: Path) -> None:
    assert all(pool.run(2, uninterrupted_and_resumed, tmp_path, optimizer))


class Statistic(nn.Module):
    """A block of two types: its statistics are in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mean = nn.Linear(8, 8), nn.Buffer(torch.zeros(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().double().mean(0), 0.1)
        return x + self.fc((x - self.mean).float().relu())


class Mixed(nn.Module):
    """Of three types: its head is in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(192, 8), nn.Sequential(*[Statistic() for _ in range(6)])
        self.head = nn.Linear(8, 5).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x.flatten(1))).bfloat16())


def saved(folder: Path, loop: Loop, **options: Any) -> Path:
    return resist.save_checkpoint(folder, loop.job, **options)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "multi": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_go_on(schedule: str, tmp_path: Path) -> None:
    def rates(loop: Loop, schedules: list[Any], steps: int) -> list[float]:
        found: list[float] = []
        for _ in range(steps):
            loop.train(1)
            for one in schedules:
                one.step(*([1.0] if schedule == "plateau" else []))
            found += [group["lr"] for one in loop.optimizers for group in one.param_groups]
        return found

    make = SCHEDULES[schedule]
    loop = Loop(warmed_up(), scheduled=False)
    schedules = [make(one) for one in loop.optimizers]
    rates(loop, schedules, 4)
    saved(tmp_path, loop, extra={"schedules": schedules})
    again = Loop(warmed_up(), scheduled=False)
    others = [make(one) for one in again.optimizers]
    resist.load_checkpoint(tmp_path, again.job, again.optimizers, extra={"schedules": others})
    assert rates(loop, schedules, 4) == rates(again, others, 4)
    assert equal(loop.everything(), again.everything())


def test_mixed_types_come_back(tmp_path: Path) -> None:
    loop = Loop(warmed_up(), OPTIMIZERS["adamw"], build=Mixed, scheduled=False).train(4)
    saved(tmp_path, loop)
    again = Loop(warmed_up(), OPTIMIZERS["adamw"], build=Mixed, scheduled=False)
    resist.load_checkpoint(tmp_path, again.job, again.optimizers)
    assert equal(loop.train(4).everything(), again.train(4).everything())


def test_extra_values_come_back_as_they_were(tmp_path: Path) -> None:
    values = {
        "epoch": 3, "best": float("inf"), "name": "a/b%", "nothing": None, "pair": (1, [2.5, True]), 7: {"1": 1, 1: 2},
        "tensor": torch.arange(6).view(2, 3).T, "complex": torch.ones(2, dtype=torch.complex128), "set": {1, 2},
        "counts": Counter({"a": 2}), "bytes": b"\x00\xff", "python": random.getstate(), "numpy": np.random.get_state(),
        "array": np.arange(3, dtype=np.uint32), "scalar": np.float32(0.1), "size": torch.Size([1, 2]),
        "dtype": torch.half,
    }  # fmt: skip
    loop = Loop(warmed_up()).train(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    sampler, generator = Sampler(), torch.Generator().manual_seed(5)
    sampler.position = 4
    path = saved(tmp_path, loop, extra={"values": values, "scaler": scaler, "sampler": sampler, "random": generator})
    assert not [file for file in path.iterdir() if file.suffix not in (".safetensors", ".json")]
    again = Loop(warmed_up()).attached()
    found = resist.load_checkpoint(tmp_path, again.job)
    assert found is not None
    for name, value in values.items():
        mine = found["values"][name]
        assert type(mine) is type(value), name
        if isinstance(value, torch.Tensor):
            assert mine.dtype == value.dtype
            assert torch.equal(mine, value)
        elif isinstance(value, np.ndarray):
            assert (mine == value).all()
        elif name == "numpy":
            np.random.set_state(mine)
        else:
            assert mine == value, name
    assert found["scaler"] == scaler.state_dict()  # as values, where nothing was given to load into

    random.setstate(found["values"]["python"])
    others = {"scaler": torch.amp.GradScaler("cpu"), "sampler": Sampler(), "random": torch.Generator()}
    found = resist.load_checkpoint(path, again.job, extra=others)
    assert found is not None
    assert found["sampler"] is others["sampler"]
    assert others["scaler"].get_scale() == 64.0
    assert torch.equal(others["sampler"].order, sampler.order)
    assert others["sampler"].position == 4
    assert torch.equal(torch.rand(3, generator=others["random"]), torch.rand(3, generator=generator))


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    loop = Loop(warmed_up()).train(2)
    for value, message in [
        (lambda: None, r"extra\['a'\]\[0\] is a builtins.function, which cannot be saved; give numbers"),
        (loop.optimizers[0], r"extra\['a'\]\[0\] is an optimizer; give it among the optimizers"),
        (torch.ones(2).to_sparse(), r"extra\['a'\]\[0\] is a torch.Tensor"),
    ]:
        with pytest.raises(UserError, match=message):
            saved(tmp_path, loop, extra={"a": [value]})
    with pytest.raises(UserError, match="keep=0; must be at least 1"):
        saved(tmp_path, loop, keep=0)
    loop.train(1)
    with pytest.raises(UserError, match="1 of 2 steps of round 2 are done, and a job is saved between two rounds"):
        saved(tmp_path, loop)
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    first = Loop(warmed_up()).train(2)
    saved(tmp_path, first)
    second = Loop(warmed_up()).train(2)
    with pytest.raises(AgreedError, match=r"has a checkpoint of another run \(round-000001\); give another folder"):
        saved(tmp_path, second)
    resist.load_checkpoint(tmp_path, second.job)
    second.train(2)
    assert saved(tmp_path, second).name == "round-000002"
    with pytest.raises(AgreedError, match="has round-000002, and this job is at round 1; remove what is later"):
        saved(tmp_path, first)


def test_a_round_that_is_saved_twice_is_there_twice(tmp_path: Path) -> None:
    loop = Loop(warmed_up()).train(2)
    for epoch in range(4):
        path = saved(tmp_path, loop, extra={"epoch": epoch}, keep=3)
    assert path.name == "round-000001-0003"
    assert len(complete(tmp_path)) == 3
    assert resist.load_checkpoint(tmp_path, loop.job) == {"epoch": 3}
    assert resist.load_checkpoint(complete(tmp_path)[1], loop.job) == {"epoch": 2}
    saved(tmp_path, loop.train(2))
    assert [path.name for path in complete(tmp_path)] == ["round-000002", "round-000001-0003"]


def test_no_checkpoint_and_damaged_ones_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(warmed_up()).train(2)
    for folder in (tmp_path, tmp_path / "none"):
        assert resist.load_checkpoint(folder, loop.job, missing_ok=True) is None
        with pytest.raises(UserError, match=r"no checkpoint in .*; give another folder, or `missing_ok=True`"):
            resist.load_checkpoint(folder, loop.job)
    older = saved(tmp_path, loop)
    newer = saved(tmp_path, loop.train(2))
    file = newer / "process-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        resist.load_checkpoint(tmp_path, loop.job)
    assert "skipped: " in caplog.text
    assert loop.job.round == 1
    with pytest.raises(UserError, match="is damaged: ") as caught:
        resist.load_checkpoint(newer, loop.job)
    assert "\n" not in str(caught.value)
    (older / "job.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged|is not a file of resist"):
        resist.load_checkpoint(tmp_path, loop.job, missing_ok=True)


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors and the metadata of a checkpoint of one process, by an author who knows the digests."""
    from resist.runs.saved import digest_of

    file = path / "process-0.safetensors"
    tensors, metadata = read_tensors(file, FORMAT), read_description(file, FORMAT).metadata
    change(tensors, metadata)
    write_tensors(file, tensors, FORMAT, metadata)
    about = json.loads((path / "job.json").read_text())
    about["files"]["process-0.safetensors"] = read_description(file, FORMAT).digest
    about.pop("digest")
    (path / "job.json").write_text(json.dumps({**about, "digest": digest_of(about)}))


CHANGES = {
    "unknown weight": "has a tensor 'blocks.9.gain'",
    "unknown worker": "has a tensor 'workers.9/buffers/norm.num_batches_tracked', which belongs to no worker",
    "unknown state": "has a tensor 'workers.1/optimizer/blocks.9.gain/exp_avg' that nothing refers to; it is damaged",
    "missing state": "is damaged: KeyError: 'workers.1/optimizer/norm.weight/exp_avg'",
    "missing buffer": "differ in the buffer 'norm.num_batches_tracked'",
    "odd record": "is damaged",
}


@pytest.mark.parametrize("change", CHANGES)
def test_unknown_and_missing_names_are_refused(change: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Loop(warmed_up(), OPTIMIZERS["adam"]).train(4))

    def edit(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        if change == "unknown weight":
            tensors["blocks.9.gain"] = torch.zeros(())
        elif change == "unknown worker":
            tensors["workers.9/buffers/norm.num_batches_tracked"] = torch.zeros(())
        elif change == "unknown state":
            tensors["workers.1/optimizer/blocks.9.gain/exp_avg"] = torch.zeros(())
        elif change == "missing state":
            del tensors["workers.1/optimizer/norm.weight/exp_avg"]
        elif change == "missing buffer":
            del metadata["records"]["1"]["buffers"]["norm.num_batches_tracked"]
            del tensors["workers.1/buffers/norm.num_batches_tracked"]
        else:
            metadata["records"]["1"] = {"optimizers": 3}

    rewritten(path, edit)
    loop = Loop(warmed_up(), OPTIMIZERS["adam"])
    before = loop.everything()
    with pytest.raises(UserError, match=CHANGES[change]) as caught:
        resist.load_checkpoint(path, loop.job, loop.optimizers)
    assert "\n" not in str(caught.value)
    assert equal(before, loop.everything())


def test_extra_that_does_not_fit_is_named(tmp_path: Path) -> None:
    loop = Loop(warmed_up()).train(2)
    saved(tmp_path, loop, extra={"sampler": Sampler(), "many": [Sampler(), Sampler()]})
    with pytest.raises(UserError, match="has no extra 'schedule'; it has many, sampler"):
        resist.load_checkpoint(tmp_path, loop.job, extra={"schedule": Sampler()})
    with pytest.raises(UserError, match=r"extra 'sampler' of checkpoint .* does not fit: "):
        resist.load_checkpoint(tmp_path, loop.job, extra={"sampler": torch.amp.GradScaler("cpu")})
    with pytest.raises(UserError, match=r"extra 'many' of checkpoint .* does not fit: 2 values, not 1"):
        resist.load_checkpoint(tmp_path, loop.job, extra={"many": [Sampler()]})


def test_the_weights_alone(tmp_path: Path) -> None:
    loop = Loop(warmed_up(), averaged=True).train(4)
    saved(tmp_path, loop)
    again = Loop(warmed_up(), OPTIMIZERS["adam"], averaged=True)
    with pytest.raises(UserError, match=r"has 1 optimizers of worker 0, this job 0; give them to job.attach"):
        resist.load_checkpoint(tmp_path, again.job)
    with pytest.raises(UserError, match=r"is SGD in .*, and Adam here"):
        resist.load_checkpoint(tmp_path, again.job, again.optimizers)
    resist.load_checkpoint(tmp_path, again.job, [])
    assert (again.job.round, again.job.step_index) == (2, 4)
    assert all(not one.state for one in again.optimizers)
    again.train(2)


def elsewhere(folder: Path, workers: int) -> tuple[int, int, dict[str, Any], dict[str, torch.Tensor] | None]:
    loop = Loop(resist.resist(workers, STEPS, min_depth=3), averaged=True)
    extra = resist.load_checkpoint(folder, loop.job, loop.optimizers, extra={"sampler": Sampler()})
    assert extra is not None
    assert all(int(average.n_averaged) == 6 for average in loop.averages)
    counted = [int(b) for w in loop.job.workers for n, b in w.model.named_buffers() if n.endswith("calls")]
    full = loop.job.full_model(averaged=True)
    numbers = {"epoch": extra["epoch"], "position": extra["sampler"].position, "calls": sum(counted) > 0}
    loop.train(2)
    weights = None if full is None else {name: t.clone() for name, t in full.state_dict().items()}
    return loop.job.round, loop.job.step_index, numbers, weights


@pytest.mark.parametrize(("workers", "processes"), [(3, 2), (2, 2), (5, 1), (4, 2), (1, 1)])
def test_other_workers_in_other_processes(pool: Pool, tmp_path: Path, workers: int, processes: int) -> None:
    loop = Loop(warmed_up(), averaged=True).train(6)
    sampler = Sampler()
    sampler.position = 6
    saved(tmp_path, loop, extra={"epoch": 2, "sampler": sampler})
    full = loop.job.full_model(averaged=True)
    assert full is not None
    results = [elsewhere(tmp_path, workers)] if processes == 1 else pool.run(processes, elsewhere, tmp_path, workers)
    for round, step, numbers, _ in results:
        assert (round, step) == (4, 6 * 3 // workers + 2)
        assert numbers == {"epoch": 2, "position": 6, "calls": True}
    for name, value in full.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(results[0][3][name], value), name


def one_cannot(folder: Path) -> str:
    """The value of one process of two cannot be saved: both end with that line, and go on."""
    loop = Loop(warmed_up()).train(2)
    value = (lambda: None) if loop.job.workers[0].index else 1
    try:
        saved(folder, loop, extra={"value": value})
    except AgreedError as error:
        saved(folder, loop, extra={"value": 1})
        shutil.rmtree(folder, ignore_errors=True)
        return str(error)
    return ""


def test_a_value_of_one_process_that_cannot_be_saved_ends_in_all(pool: Pool, tmp_path: Path) -> None:
    texts = pool.run(2, one_cannot, tmp_path / "folder")
    assert texts[0] == texts[1]
    assert "extra['value'] is a builtins.function" in texts[0]
    assert texts[0].endswith("(process 1)")
