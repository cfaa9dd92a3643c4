"""Configurations, chains, checkpoints and metrics that are cut, mutated or swapped: a UserError in one line, or nothing
wrong; never a traceback, never other weights."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.planning.strategy import resist
from resist.runs.checkpoint import Checkpoints
from resist.runs.config import NetworkConfig, RunConfig, TrainConfig
from resist.runs.config_file import from_json, read_config
from resist.runs.directory import Run
from resist.runs.history import read_history, read_past
from resist.runs.restore import restore
from resist.runs.saved import FORMAT, complete, digest_of, newest, read_job, verify
from resist.runs.tensor_file import read_description, read_tensors, verify_tensors, write_tensors
from resist.training.progress import Summary
from support import make, tiny, train, weights

STEPS = 2
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ODD = st.sampled_from(
    [-1, 0, 1, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "\x00", [], {}, [[]], True, None]
)


DAMAGE = st.tuples(
    st.sampled_from(["cut", "byte", "double", "hole", "other"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(1, 255), st.binary(max_size=64),
)  # fmt: skip


def one_line(action: Callable[[], object]) -> bool:
    """Whether `action` ended without an error. Any other than a UserError of one line goes through."""
    try:
        action()
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error)
        return False
    return True


PATHS = [(part, name) for part, values in TrainConfig().to_json().items() for name in values]


@given(st.lists(st.tuples(st.sampled_from(PATHS), ODD | JSON), min_size=1, max_size=3))
@example([(("optimization", "lr"), 10**400)])  # JSON has no largest number
def test_mutated_configurations(changes: list[tuple[tuple[str, str], Any]]) -> None:
    data: Any = TrainConfig(
        network=NetworkConfig(model_args=("width=8",)), run=RunConfig(until=("rounds=3",))
    ).to_json()
    for (part, name), value in changes:
        data[part][name] = value

    def use() -> None:
        config = from_json(json.loads(json.dumps(data)))
        config.check()

    one_line(use)


@given(JSON)
def test_configurations_that_are_anything(data: Any) -> None:
    assert one_line(lambda: from_json(json.loads(json.dumps(data))).check()) == (data == {})


@given(DAMAGE)
def test_damaged_configuration_files(tmp_path_factory: pytest.TempPathFactory, damage: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    whole = json.dumps(TrainConfig().to_json()).encode()
    (folder / "config.json").write_bytes(damaged(whole, damage))
    one_line(lambda: read_config(folder))


def damaged(content: bytes, damage: tuple[str, list[float], int, bytes]) -> bytes:
    """Cut, with a byte changed, with a part doubled or taken out, or other bytes altogether."""
    kind, places, change, other = damage
    at, to = (int(place * len(content)) for place in places)
    if kind == "cut":
        return content[:at]
    if kind == "byte" and at < len(content):
        return content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]
    if kind == "double":
        return content[:to] + content[at:]
    if kind == "hole":
        return content[:at] + content[to:]
    return other


NUMBERS = st.integers(-3, 30) | st.just(10**40)
CHAIN = st.one_of(
    st.text(max_size=20),
    st.builds("{}:{}-{}".format, st.sampled_from(["layer1", "layer3", "layer3.0", "conv1", "", "a"]), NUMBERS, NUMBERS),
    st.text(alphabet="layer3:-,. 0123456789\x00é٣", max_size=16),
)


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 2)
@given(st.lists(CHAIN, max_size=3))
def test_chain_expressions(chains: list[str]) -> None:
    one_line(lambda: choose_chains(tiny(), tuple(chains)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    """Checkpoints of rounds 1 and 2, and the weights of each."""
    folder, found = tmp_path_factory.mktemp("whole"), dict[int, dict[str, Tensor]]()
    job, optimizers = make(resist(2, STEPS, min_depth=0))
    checkpoints = Checkpoints(folder, job.transport)
    for _ in range(2):
        train(job, optimizers, STEPS)
        checkpoints.begin(job, tuple(optimizers), {})
        checkpoints.finish()
        found[job.round] = weights(job)
    return folder, found


def resumed(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    path, skipped = newest(folder)
    assert all("\n" not in str(error) for error in skipped)
    if path is None:
        return None
    at = verify(path)["round"]
    job, optimizers = make(resist(2, STEPS, min_depth=0), resume_at=(at, at * STEPS))
    restore(job, tuple(optimizers), path)
    return at, weights(job)


KINDS = st.sampled_from(["damage", "damage", "swap", "remove", "folder", "link"])


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 3)
@given(st.lists(st.tuples(KINDS, st.integers(0, 99), st.integers(0, 99), DAMAGE), min_size=1, max_size=2))
def test_damaged_checkpoints(
    run: tuple[Path, dict[int, dict[str, Tensor]]], tmp_path_factory: pytest.TempPathFactory, changes: list[Any]
) -> None:
    """Whatever was done to the files, what is resumed is a state that was saved."""
    whole, saved = run
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(whole, folder)
    for kind, one, two, damage in changes:
        files = sorted(file for path in complete(folder) for file in path.iterdir() if file.is_file())
        file, other = files[one % len(files)], files[two % len(files)]
        if kind == "damage":
            file.write_bytes(damaged(file.read_bytes(), damage))
        elif kind == "swap":
            first, second = file.read_bytes(), other.read_bytes()
            file.write_bytes(second)
            other.write_bytes(first)
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()
            elif kind == "link":
                file.symlink_to(file.name)  # to itself
    found: list[tuple[int, dict[str, Tensor]] | None] = []
    if one_line(lambda: found.append(resumed(folder))) and found[0] is not None:
        at, values = found[0]
        assert all(torch.equal(values[name], value) for name, value in saved[at].items())
    shutil.rmtree(folder.parent)


ABOUT = {
    "format": FORMAT, "round": 1, "step": 2, "workers": 2, "processes": 1, "files": {"process-0.safetensors": "0"},
}  # fmt: skip


@given(st.dictionaries(st.sampled_from([*ABOUT, "more"]), ODD | JSON, max_size=3))
def test_mutated_descriptions_of_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("checkpoint")
    about = json.loads(json.dumps(ABOUT | changes))
    (path / "job.json").write_text(json.dumps(about | {"digest": digest_of(about)}))
    one_line(lambda: read_job(path))
    assert not one_line(lambda: verify(path))  # it has no files


@given(JSON)
def test_descriptions_of_a_checkpoint_that_are_anything(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("checkpoint")
    for content in (json.dumps(data), json.dumps({"format": data}), "[" * 100_000):
        (path / "job.json").write_text(content)
        assert not one_line(lambda: read_job(path))


@pytest.mark.slow
@given(DAMAGE)
def test_damaged_tensor_files(tmp_path_factory: pytest.TempPathFactory, damage: Any) -> None:
    """What is read is what was written, or there is a line that names the file."""
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    tensors = {"a\nb": torch.arange(5), "c": torch.tensor(1.5), "d": torch.ones(2, 3).bfloat16()}
    write_tensors(path, tensors, "a format", {"round": 3, "names": {"x": 1}})
    path.write_bytes(damaged(path.read_bytes(), damage))
    if one_line(lambda: verify_tensors(path, "a format")):
        assert verify_tensors(path, "a format").metadata == {"round": 3, "names": {"x": 1}}
        found = read_tensors(path, "a format")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    one_line(lambda: read_description(path, "a format"))
    one_line(lambda: read_tensors(path, "a format", lambda name: name == "c"))


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), JSON | ODD, max_size=3), st.binary(max_size=40))
def test_tensor_files_whose_headers_are_anything(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    entry = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [0, len(data)]}
    metadata = {"format": "a format", "digest": "0", "round": "[" * 100_000}
    header = json.dumps({"__metadata__": metadata, "a": entry} | entries)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    for read in (read_description, verify_tensors, read_tensors):
        assert not one_line(lambda read=read: read(path, "a format"))


RECORD = {
    "round": 1, "step": 3, "epoch": 0.1, "lr": 0.05, "accuracy": None, "images": 384, "loss": 2.3,
    "seconds": {"compute": 0.1, "wait": 0.0, "sync": 0.01, "checkpoint": 0.0, "evaluate": 0.0},
    "bytes": {"control": 1, "shared": 2, "blocks": 3, "state": 4}, "capacity": {}, "plan": {}, "workers": [],
}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 2)
@given(
    st.integers(0, 2), st.dictionaries(st.sampled_from([*RECORD]), ODD | JSON, max_size=2), st.none() | DAMAGE
)  # fmt: skip
def test_metrics(tmp_path_factory: pytest.TempPathFactory, number: int, changes: dict[str, Any], damage: Any) -> None:
    """Read by a report, and by a run that goes on: what cannot be used is named or left out."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(TrainConfig().to_json()))
    (folder / "environment.json").write_text("{}")
    lines = [dict(RECORD, round=number, step=3 * number) for number in (1, 2, 3)]
    lines[number] |= changes
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "metrics.jsonl").write_bytes(content if damage is None else damaged(content, damage))
    one_line(lambda: read_history(folder))
    one_line(lambda: read_past(folder, 2))
    one_line(lambda: go_on(folder))
    shutil.rmtree(folder)


def go_on(folder: Path) -> None:
    summary = Summary(3)
    with contextlib.closing(Run(folder, TrainConfig(), 2)) as made:
        for record in made.past:
            summary.add(record)
        assert summary.figures()
        made.append(dict(RECORD, round=3))
