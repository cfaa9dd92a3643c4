"""Capacities by chain and by round on the command line: plan, cost, train and its records."""

import json
from pathlib import Path
from typing import Any

import pytest

from resist.cli import main

NETWORK = ["--model-args", "depths=1,4,7,1", "width=4"]
METHOD = {
    "workers": 2,
    "local_steps": 2,
    "capacities_by_chain": ["layer2=2,1"],
    "capacities_by_round": ["0:layer3=3,4", "2=6"],
}


def resist(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "growing.json"
    path.write_text(json.dumps({"network": {"chain": ["all"]}, "method": METHOD}))
    return str(path)


def test_plan_shows_the_capacities_of_each_chain_and_their_changes(capsys, file: str) -> None:
    arguments = ["plan", *NETWORK, "--config", file, "--rounds", "4"]
    status, text, err = resist(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    facts = json.loads(text)
    assert {chain["name"]: chain["capacities"] for chain in facts["chains"]} == {
        "layer3:1-6": [3, 4], "layer2:1-3": [2, 1],
    }  # fmt: skip
    (change,) = facts["changes"]
    assert (change["after_rounds"], change["capacities"]) == (2, {"layer3:1-6": [6, 6], "layer2:1-3": [3, 3]})
    assert change["held_by_worker"] == [facts["parameters"]] * 2
    large, small = (chain["parameters_of_a_block"] for chain in facts["chains"])
    assert facts["held_by_worker"] == [facts["shared"] + 3 * large + 2 * small, facts["shared"] + 4 * large + small]
    sizes = [[len(held) for held in entry["plan"]["layer3:1-6"]] for entry in facts["rounds"]]
    assert sizes == [[3, 4], [3, 4], [6, 6], [6, 6]]
    _, text, _ = resist(capsys, *arguments)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in ("blocks held by each worker 3 4", "after 2 rounds 6 6", "blocks held by each worker 2 1",
                     "after 2 rounds 3 3", "after 2 rounds 100% 100%"):  # fmt: skip
        assert expected in lines


def test_plan_warns_of_a_chain_that_is_whole_and_names_the_options(capsys) -> None:
    _, text, _ = resist(capsys, "plan", "--model-args", "depths=1,1,5,1", "width=4", "--workers", "2")
    note = "note: chain layer3:1-4: every worker holds all 4 blocks, since --min-depth 4; that is local SGD; give --min"
    assert note in text
    _, text, _ = resist(capsys, "plan", "--model-args", "depths=1,1,6,8", "width=4", "--workers", "2")
    assert "layer4:1-7" in text
    assert "note: with --chain all" not in text  # section 4 has most of the weights
    _, text, _ = resist(capsys, "plan", "--model-args", "depths=1,1,7,6", "width=4", "--workers", "2")
    assert "note: with --chain all a worker holds" in text


@pytest.mark.slow
def test_cost_has_a_row_for_each_size(capsys, file: str) -> None:
    arguments = ["cost", *NETWORK, "--config", file, "--batch-size", "2", "--strategies", "resist", "local_sgd"]
    status, text, _ = resist(capsys, *arguments, "--json")
    assert status == 0
    rows = json.loads(text)["strategies"]
    blocks = {row["strategy"]: [network["blocks"] for network in row["networks"]] for row in rows}
    assert blocks == {
        "resist after 0 rounds": [[3, 2], [4, 1]], "resist after 2 rounds": [[6, 3]], "local_sgd": [[6, 3]],
    }  # fmt: skip


def test_cost_refuses_keys_that_do_nothing(capsys, file: str) -> None:
    status, _, err = resist(capsys, "cost", *NETWORK, "--config", file, "--strategies", "ddp")
    assert status == 2
    assert (
        err
        == "resist: method.capacities_by_chain has no effect without strategy resist; add it, or remove the option\n"
    )


@pytest.mark.slow
def test_a_growing_run_is_recorded_resumed_and_reported(capsys, file: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--batch-size", "32", "--epochs", "0.2", "--num-evals", "1", "--device", "cpu", "--processes", "1"]
    options += ["--batchnorm", "average", "--checkpoint-rounds", "1"]
    status, text, err = resist(
        capsys, "train", *NETWORK, "--config", file, *options, "--out", str(out), "--until", "rounds=3"
    )
    assert (status, err) == (0, "")
    assert "chain layer3:1-6: 6 blocks, the workers hold 3 4; after 2 rounds 6 6" in text
    assert "chain layer2:1-3: 3 blocks, the workers hold 2 1; after 2 rounds 3 3" in text
    config = json.loads((out / "config.json").read_text())
    assert config["method"]["capacities_by_round"] == METHOD["capacities_by_round"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["capacity"]["layer3:1-6"] for record in records] == [[3, 4], [3, 4], [6, 6]]
    assert [record["capacity"]["layer2:1-3"] for record in records] == [[2, 1], [2, 1], [3, 3]]
    status, _, _ = resist(capsys, "evaluate", str(out), "--device", "cpu")
    assert status == 0
    status, _, _ = resist(capsys, "report", str(out))
    assert status == 0
