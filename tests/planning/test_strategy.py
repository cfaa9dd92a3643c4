"""Strategies: records, switches, and refused arguments."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import resist as package
from resist.errors import UserError
from resist.planning.methods import METHODS, build_strategy
from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch


def test_resist_gives_each_worker_its_share_and_four_blocks_at_least() -> None:
    assert [resist(s).assign(22, chain="c", seed=0, round=0).capacities[0] for s in (1, 2, 4, 8)] == [22, 11, 6, 4]
    assert resist(8, min_depth=0).assign(22, chain="c", seed=0, round=0).capacities == (3,) * 8
    assert resist(2, min_depth=15).assign(22, chain="c", seed=0, round=0).capacities == (15, 15)
    assert resist(3).assign(3, chain="c", seed=0, round=0).held_by_all  # four blocks at least, of three
    assert resist(2, capacities=(20, 2)).assign(22, chain="c", seed=0, round=0).capacities == (20, 2)


def test_local_sgd_gives_every_worker_all_blocks() -> None:
    plan = local_sgd(3).assign(5, chain="c", seed=0, round=7)
    assert (plan.held_by_all, plan.workers) == (True, 3)


def test_a_switch_takes_over_at_its_round() -> None:
    first, second, third = local_sgd(2, 1), resist(2, 2), local_sgd(2, 3)
    both = switch(switch(first, second, at_round=3), third, at_round=5)
    assert [both.at(round).local_steps for round in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    nested = switch(first, switch(second, third, at_round=5), at_round=3)
    assert [nested.at(round).local_steps for round in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    assert switch(first, second, at_round=0).at(0).local_steps == 2
    skipped = switch(switch(first, second, at_round=3), third, at_round=3)
    assert [skipped.at(round).local_steps for round in range(5)] == [1, 1, 1, 3, 3]
    assert first.at(99) is first


def test_the_warm_up_of_resist_is_a_switch() -> None:
    strategy = resist(2, 5, warmup_rounds=2)
    assert [strategy.at(round).name for round in range(4)] == ["local_sgd", "local_sgd", "resist", "resist"]
    assert [strategy.at(round).partitions for round in (0, 2)] == [False, True]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_by_its_name_from_the_options_that_it_takes(name: str) -> None:
    options = {"min_depth": 3, "capacities": None, "optimizer_state": "reset", "outer": None, "warmup_rounds": 0}
    strategy = build_strategy(name, 3, 7, **options)
    assert (strategy.name, strategy.workers, strategy.local_steps) == (name, 3, 7)
    assert strategy.optimizer_state == ("reset" if "optimizer_state" in METHODS[name].options else "keep")
    assert strategy.partitions == ("min_depth" in METHODS[name].options)


def test_only_the_table_spells_the_names_of_methods() -> None:
    """All other files take them from `METHODS`. Those of the package itself are not counted, nor its public names."""
    root = Path(package.__file__).parent
    names = {*METHODS, switch.__name__} - {package.__name__}
    texts = {file: file.read_text(encoding="utf-8") for file in root.rglob("*.py")}
    spelled = {
        str(file.relative_to(root))
        for file, text in texts.items()
        if any(f'"{name}"' in text or f"'{name}'" in text for name in names)  # to parse a file takes far longer
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert spelled == {"__init__.py"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resist(0), r"`workers=0`; must be at least 1"),
        (lambda: local_sgd(-1), r"`workers=-1`"),
        (lambda: resist(2, 0), r"`local_steps=0`; must be at least 1"),
        (lambda: diloco(2, outer=(0.7, 0.9)), r"`outer=\(0.7, 0.9\)` is not an outer optimizer; give one"),  # type: ignore[arg-type]
        (lambda: OuterSGD(lr=float("inf")), r"`outer=inf 0.9`: learning rate inf; must be more than 0 and finite"),
        (lambda: OuterSGD(lr=0), r"`outer=0 0.9`: learning rate 0"),
        (lambda: OuterSGD(momentum=float("nan")), r"`outer=0.7 nan`: momentum nan; must be at least 0 and less than 1"),
        (
            lambda: resist(3, capacities=(1, 2)),
            r"`capacities=1 2` has 2 values for `workers=3`; give one for each worker",
        ),
        (lambda: resist(2, capacities=(1, 2), min_depth=1), r"`min_depth=1` has no effect with `capacities`"),
        (
            lambda: resist(2, capacities=(1, 2)).assign(22, chain="c", seed=0, round=0),
            r"hold 3 of the 22 blocks of chain c",
        ),
        (lambda: resist(2, redraw_every=0), r"`redraw_every=0`; must be at least 1"),
        (lambda: resist(2, redraw_every=1.5), r"`redraw_every=1.5` is not a whole number; give one"),  # type: ignore[arg-type]
        (lambda: resist(2, redraw_every=True), r"`redraw_every=True` is not a whole number; give one"),
        (lambda: resist(True), r"`workers=True` is not a whole number; give one"),
        (lambda: local_sgd(2, True), r"`local_steps=True` is not a whole number; give one"),
        (lambda: resist(2, min_depth=True), r"`min_depth=True` is not a whole number; give one"),
        (lambda: resist(2, capacities=True), r"`capacities=True` is not a whole number; give one"),
        (lambda: resist(2, warmup_rounds=0.5), r"`warmup_rounds=0.5` is not a whole number; give one"),  # type: ignore[arg-type]
        (lambda: resist(2, warmup_rounds=-1), r"`warmup_rounds=-1`; must be at least 0"),
        (lambda: build_strategy("sgd", 2, 1), r"strategy 'sgd' is not one of resist, local_sgd, diloco, ddp"),
        (lambda: switch(resist(2), ddp(2), at_round=1), r"ddp cannot be part of a switch"),
        (lambda: switch(resist(2), resist(3), at_round=1), r"from 2 to 3 workers; give both the same number"),
        (lambda: switch(resist(2), resist(2), at_round=1.5), r"`at_round=1.5` is not a whole number; give one"),  # type: ignore[arg-type]
        (lambda: switch(resist(2), resist(2), at_round=-1), r"`at_round=-1`; must be at least 0"),
        (
            lambda: switch(switch(resist(2), resist(2), at_round=4), resist(2), at_round=3),
            r"at_round=3 comes before the switch at round 4; order them",
        ),
    ],
)
def test_refusals(make: Callable[[], Strategy], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
