"""`--config`: options from a file, and the same run again."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from resist.cli import COMMANDS, main, train
from resist.cli.parse import parse
from resist.cli.train import MAY_CHANGE, resumed
from resist.errors import UserError
from resist.runs.config import MethodConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.config_file import from_json, read_config_file

pytestmark = pytest.mark.slow

RECORDS = {name: record for name, (record, _) in COMMANDS.items()}
SMALL = [
    "--workers", "2", "--min-depth", "0", "--model-args", "depths=1,1,3,1", "width=4", "--batch-size", "64",
    "--local-steps", "2", "--epochs", "0.1", "--num-evals", "1", "--device", "cpu", "--processes", "1",
]  # fmt: skip


def parsed(*arguments: str) -> tuple[Any, frozenset[str]]:
    return parse(RECORDS, arguments)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    inner = get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{f.name: values_of(hints[f.name]) for f in fields(hint)})
    if type(None) in inner:
        return st.none() | values_of(inner[0])
    if get_origin(hint) is Union:
        return st.one_of(*map(values_of, inner))
    if get_origin(hint) is Literal:
        return st.sampled_from(inner)
    if get_origin(hint) is tuple:
        sizes = {} if inner[-1] is Ellipsis else {"min_size": len(inner), "max_size": len(inner)}
        return st.lists(values_of(inner[0]), **sizes).map(tuple)
    if get_origin(hint) is dict:
        return st.dictionaries(st.text(), st.booleans() | st.integers() | st.lists(st.integers()))
    if hint is Path:
        return st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(Path)
    plain = {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: st.text()}
    return plain[hint]


@given(values_of(TrainConfig))
def test_every_configuration_comes_back_from_its_json(config: TrainConfig) -> None:
    assert from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_file_gives_defaults_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"method": {"sampling": "shard", "workers": 3, "outer": [1, 0.9]},
                                       "machine": {"compile": True}, "optimization": {"lr": 1}})  # fmt: skip
    config, given_names = parsed("train", "--workers", "2", "--config", str(file))
    assert config.method == MethodConfig(sampling="shard", workers=2, outer=(1.0, 0.9))
    assert config.optimization == OptimizationConfig(lr=1.0)
    assert config.machine.compile
    assert given_names == {"sampling", "workers", "outer", "compile", "lr"}
    config, _ = parsed("train", f"--config={file}", "--no-compile")
    assert not config.machine.compile
    assert parsed("train") == (TrainConfig(), frozenset())


def test_out_and_resume_are_not_taken_over(tmp_path: Path) -> None:
    run = TrainConfig(run=RunConfig(out=Path("old"), resume=Path("old"), seed=3))
    config, given_names = parsed("train", "--config", str(write(tmp_path / "config.json", run.to_json())))
    assert config == replace(run, run=RunConfig(seed=3))
    assert not given_names & {"out", "resume"}


def test_other_commands_take_what_they_have(tmp_path: Path) -> None:
    run = {"network": {"data": "cifar10"}, "method": {"workers": 2, "local_steps": 7}, "run": {"seed": 5}}
    file = str(write(tmp_path / "config.json", run))
    plan, _ = parsed("plan", "--config", file)
    assert (plan.network.data, plan.method.workers, plan.seed) == ("cifar10", 2, 5)
    cost, _ = parsed("cost", "--config", file, "--workers", "4")
    assert (cost.network.data, cost.local_steps, cost.workers) == ("cifar10", 7, (4,))
    compare, _ = parsed("compare", "--config", file)
    assert [run.run.seed for run in compare.runs(tmp_path)] == [5, 5]
    assert parsed("cost", "--config", file)[0].workers == (2,)
    assert {run.method.local_steps for run in compare.runs(tmp_path)} == {7}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is not a configuration"),
        ("[" * 100_000, "is not a configuration"),
        ('{"method": {"workers": 2, "workers": 3}}', "it has the entry 'workers' twice"),
        ([], "not a table of names and values"),
        ({"methods": {}}, "unknown entry 'methods'; did you mean method?"),
        ({"method": {"samplin": 1}}, "unknown entry 'samplin'; did you mean sampling?"),
        ({"optimization": {"workers": 1}}, "unknown entry 'optimization.workers'; it belongs to 'method'"),
        ({"method": {"zzz": 1}}, "unknown entry 'zzz'"),
        (
            {"network": {"sections": [1]}},
            "'sections', an entry of an earlier version of resist, is now model_args, as in [\"depths=3,4,23,3\"]",
        ),
        ({"method": {"workers": "two"}}, 'method.workers has the value "two", which is not a whole number'),
        ({"method": {"workers": True}}, "method.workers has the value true, which is not a whole number"),
        ({"method": {"scale": 0.5}}, "method.scale has the value 0.5, which is not a string"),
        ({"optimization": {"epochs": None}}, "optimization.epochs has the value null, which is not a number"),
        ({"optimization": {"optimizer_args": ["eps"]}}, 'has the value ["eps"], which is not a table of names and'),
        ({"network": {"data": "a\nb\0"}}, "--data a\\nb\\x00 is not known"),
        ({"method": {"sampling": "some"}}, 'method.sampling has the value "some", which is not one of all, shard'),
        ({"method": {"outer": [0.7]}}, "which is not a list of 2 numbers"),
        ({"machine": {"log": ["tensorbord"]}}, 'machine.log has the value "tensorbord", which is not one of'),
        ({"method": 3}, "method is not a table of names and values"),
    ],
)
def test_a_file_that_cannot_be_used_ends_in_one_line_with_its_name(capsys, tmp_path, content, text: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(file)])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(f"resist: {file}") or "--data" in text
    assert text in err


def test_a_run_is_repeated_from_its_configuration(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "more.json", {"method": {"sampling": "shard"}, "optimization": {"label_smoothing": 0.1}})
    for arguments in ([*SMALL, "--config", str(file), "--out", "a"], ["--config", "a/config.json", "--out", "b"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments])
        assert ended.value.code == 0, capsys.readouterr().err
    a, b = (json.loads(Path(run, "config.json").read_text()) for run in "ab")
    assert a["method"]["sampling"] == "shard"
    assert a | {"run": {**a["run"], "out": "b"}} == b
    weights, again = (load_file(Path(run, "model.safetensors")) for run in "ab")
    assert all((again[name] == tensor).all() for name, tensor in weights.items())


def test_processes_that_are_started_get_the_configuration_as_it_is(tmp_path: Path) -> None:
    """For a new run all of it; for one that resumes what may change, because the rest is that of the run."""
    config = TrainConfig(
        method=MethodConfig(workers=3, outer=(0.7, 0.9), scale="0.3"),
        optimization=OptimizationConfig(epochs=1 / 3, lr=0.1 + 0.2),
        run=RunConfig(out=tmp_path / "run", until=("rounds=3",)),
    )
    again, _ = parsed(*train._arguments(config, tmp_path / "a.json"))
    assert again == config
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.json", config.to_json())
    changed = replace(
        config,
        method=replace(config.method, workers=2, replicate=True),
        optimization=replace(config.optimization, lr=0.01),
        run=replace(config.run, resume=tmp_path / "run"),
    )
    whole = resumed(changed, frozenset({"workers", "replicate", "lr", "resume"}))
    assert whole.optimization.epochs == 0.5  # as many images with two workers
    assert resumed(*parsed(*train._arguments(whole, tmp_path / "b.json"))) == whole
    names = {name for part in json.loads((tmp_path / "b.json").read_text()).values() for name in part}
    assert names == set().union(*MAY_CHANGE.values())


def test_what_a_resumed_run_cannot_change_is_refused_also_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.json", TrainConfig().to_json())
    config, names = parsed("train", "--resume", str(tmp_path / "run"), "--config", str(
        write(tmp_path / "a.json", {"method": {"sampling": "shard"}})))  # fmt: skip
    with pytest.raises(UserError, match=r"sampling` cannot change in a resumed run; remove it"):
        resumed(config, names)


def test_a_file_is_read_without_its_values_being_checked(tmp_path: Path) -> None:
    config, _ = read_config_file(write(tmp_path / "a.json", {"method": {"workers": 0}}))
    assert config.method.workers == 0


def test_a_flag_may_repeat_what_the_file_sets(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.json", {"machine": {"compile": True}}))
    config, _ = parsed("train", "--compile", "--config", file)
    assert config.machine.compile


OFF = {"compile": False, "channels_last": False, "no_progress": False, "log": []}


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "options"])
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_a_resumed_run_turns_machine_options_off_as_well_as_on(tmp_path: Path, in_file: bool, on: bool) -> None:
    """All of them from a file, and with --no- in front those that the command line has."""
    states = [OFF, {name: ["wandb"] if value == [] else True for name, value in OFF.items()}]
    run, wanted = states[not on], states[on]
    write(tmp_path / "config.json", {"machine": run, "method": {"replicate": not on}})
    arguments = ["--log", "wandb", "--compile", "--replicate"] if on else ["--no-log", "--no-compile", "--no-replicate"]
    if in_file:
        file = write(tmp_path / "a.json", {"machine": wanted, "method": {"replicate": on}})
        arguments = ["--config", str(file)]
    config = resumed(*parsed("train", "--resume", str(tmp_path), *arguments))
    found = config.to_json()["machine"]
    assert {name: found[name] for name in OFF if in_file or name in ("compile", "log")} == {
        name: value for name, value in wanted.items() if in_file or name in ("compile", "log")
    }
    assert config.method.replicate is on
    # The processes that are started get them too.
    again, names = parsed(*train._arguments(config, tmp_path / "b.json"))
    assert resumed(again, names) == config


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--compile=false"], "--compile takes no value; give --compile or --no-compile"),
        (["--compile", "no"], "--compile takes no value; give --compile or --no-compile"),
        (["--no-compile=true"], "--no-compile takes no value; give --compile or --no-compile"),
        (["--compile", "--no-compile"], "--compile and --no-compile contradict each other; give one"),
        (["--no-log", "wandb"], "--no-log takes no value; give --log or --no-log"),
        (["--no-log=wandb"], "--no-log takes no value"),
        (["--log", "wandb", "--no-log"], "--log and --no-log contradict each other; give one"),
        (["--log"], "--log needs a value"),
        (["--no-workers"], "--no-workers is not an option of resist train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_is_on_or_off_takes_no_value(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        parsed("train", *arguments)


def test_a_resumed_run_takes_equal_values_and_its_errors_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", TrainConfig().to_json())
    arguments = ("train", "--resume", str(tmp_path), "--batch-size", "128")
    assert resumed(*parsed(*arguments, "--config", str(file))) == TrainConfig(run=RunConfig(resume=tmp_path))
    write(file, {"optimization": {"lr": -1}})
    with pytest.raises(UserError, match=r"config\.json: `lr=-1` is too small"):
        resumed(*parsed("train", "--resume", str(tmp_path)))
