import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import UserError
from resist.planning.capacities import Capacities
from resist.planning.wire import Wire
from resist.runs.config import (
    MachineConfig,
    MethodConfig,
    NetworkConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from resist.runs.config_file import from_json

CHANGED = TrainConfig(
    network=NetworkConfig(data="cifar10", data_dir=Path("d"), model_args=("depths=1,2,3,4",), chain=("layer3:1-2",)),
    method=MethodConfig(workers=3, capacities=(2, 1, 1), scale="0.5", optimizer_state="reset"),
    optimization=OptimizationConfig(epochs=1.5, nesterov=True),
    machine=MachineConfig(processes=2, precision="bf16"),
    run=RunConfig(out=Path("runs/x"), seed=7),
)


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED])
def test_json_brings_a_configuration_back(config: TrainConfig) -> None:
    assert from_json(json.loads(json.dumps(config.to_json()))) == config


def refused(**parts: object) -> str:
    with pytest.raises(UserError) as caught:
        TrainConfig(**parts).check()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "text"),
    [
        ("optimization", "batch_size", 0, "`batch_size=0` is too small; give at least 1"),
        ("optimization", "lr", -1.0, "`lr=-1` is too small"),
        ("optimization", "lr", float("nan"), "`lr=nan` is not a finite number"),
        ("optimization", "epochs", 0.0, "`epochs=0` must be above 0"),
        ("optimization", "grad_accum_steps", 3, "is not a multiple of `grad_accum_steps=3`"),
        ("optimization", "lr_schedule", "linear", "`lr_schedule='linear'` is not one of step, cosine, constant"),
        ("optimization", "momentum", 1.5, "`momentum=1.5`; must be less than 1; 0.9 is usual"),
        ("optimization", "momentum", 1.0, "`momentum=1`; must be less than 1"),
        ("network", "image_size", 100_000, "`image_size=100000` is too large; give at most 8192"),
        ("machine", "restarts", 10**6, "`restarts=1000000` is too large; give at most 1000"),
        ("machine", "device", "cuda:9", "`device='cuda:9'` is not one of auto, cpu, cuda"),
        ("method", "workers", 0, "workers=0"),
        ("method", "local_steps", 0, "local_steps=0"),
        ("method", "capacities", (1, 2), "`capacities=1 2` has 2 values for `workers=4`"),
        ("method", "scale", "big", "`scale='big'`"),
        ("method", "scale", "-1", "`scale='-1'`"),
        ("method", "warmup_rounds", -1, "`warmup_rounds=-1`"),
        ("method", "redraw_every", 0, "`redraw_every=0` is too small; give at least 1"),
        ("optimization", "label_smoothing", -0.1, "`label_smoothing=-0.1` is too small"),
        ("optimization", "label_smoothing", 1.0, "`label_smoothing=1`; must be less than 1"),
        ("optimization", "clip_grad_norm", 0.0, "`clip_grad_norm=0` must be above 0"),
        (
            "optimization",
            "model_ema_decay",
            1.0,
            "`model_ema_decay=1.0` is not between 0 and 1; give for example 0.999",
        ),
        ("optimization", "model_ema_decay", -0.1, "`model_ema_decay=-0.1` is not between 0 and 1"),
        ("optimization", "mixup", -1.0, "`mixup=-1` is too small; give at least 0"),
        ("optimization", "rand_augment", (0, 9), "`rand_augment=0 9`; give 1 to 14 operations"),
        (
            "optimization",
            "rand_augment",
            (2, 31),
            "`rand_augment=2 31`; give 1 to 14 operations and a magnitude from 0",
        ),
        ("optimization", "rand_augment", (2, 9), "`rand_augment` has no effect with `data=digits`, only with folder"),
        ("optimization", "optimizer_args", {"eps": {}}, "`optimizer_args`: eps is not a finite number, true, false"),
        ("optimization", "optimizer_args", {"eps": float("nan")}, "`optimizer_args`: eps is not a finite number"),
        ("network", "image_size", 224, "`image_size` has no effect with `data=digits`, only with folder, imagenet"),
        ("network", "data_workers", 2, "`data_workers` has no effect with `data=digits`"),
        ("network", "data_workers", -1, "`data_workers=-1` is too small"),
        ("network", "skip_bad_files", True, "`skip_bad_files` has no effect with `data=digits`"),
        ("machine", "processes", 5, "`processes=5` exceeds `workers=4`"),
        ("machine", "timeout_s", 0.0, "`timeout_s=0`"),
        ("run", "num_evals", 0, "`num_evals=0`"),
        ("run", "until", ("hours=1",), "`until='hours=1'`"),
        ("run", "until", ("seconds=",), "`until='seconds='`"),
        ("run", "until", ("rounds=1.5",), "`until='rounds=1.5'`: give a whole number of rounds"),
        ("run", "until", ("accuracy=95",), "an accuracy is at most 1"),
        ("run", "until", ("rounds=3", "gb=1", "rounds=4"), "`until='rounds=4'` is the second limit of rounds"),
    ],
)
def test_values_outside_their_bounds_are_named(part: str, name: str, value: object, text: str) -> None:
    changed = dataclasses.replace(getattr(TrainConfig(), part), **{name: value})
    assert text in refused(**{part: changed})


NUMBERS = [
    (part.name, f.name, getattr(getattr(TrainConfig(), part.name), f.name))
    for part in dataclasses.fields(TrainConfig)
    for f in dataclasses.fields(getattr(TrainConfig(), part.name))
    if re.search(r"\b(int|float)\b", str(typing.get_type_hints(type(getattr(TrainConfig(), part.name)))[f.name]))
]


@pytest.mark.parametrize(("part", "name", "default"), NUMBERS, ids=[name for _, name, _ in NUMBERS])
def test_huge_numbers_are_refused_in_one_short_line(part: str, name: str, default: object) -> None:
    for huge in (10**23, -(10**23), 10**5000, 1e300, float("inf")):
        value = (huge, 1) if isinstance(default, tuple) or name == "outer" else huge
        changed = dataclasses.replace(getattr(TrainConfig(), part), **{name: value})
        assert len(refused(**{part: changed})) < 120


def test_formats_of_single_parts_override_those_of_the_name() -> None:
    method = MethodConfig(wire="int8", wire_parts=("shared=int4", "state=fp32"))
    assert method.wires() == Wire(shared="int4", blocks="bf16", state="fp32")
    assert "`wire_parts=all=int8`; give a part" in refused(method=MethodConfig(wire_parts=("all=int8",)))
    assert "blocks='int4' is not one of" in refused(method=MethodConfig(wire_parts=("blocks=int4",)))
    assert "`wire_parts` has no effect" in refused(method=MethodConfig(strategy="ddp", wire_parts=("shared=int8",)))


def test_options_that_would_do_nothing_are_refused() -> None:
    assert "`capacities`" in refused(method=MethodConfig(strategy="local_sgd", capacities=(1, 1, 1, 1)))
    assert "`min_depth`" in refused(method=MethodConfig(strategy="local_sgd", min_depth=0))
    for option in (
        {"optimizer_state": "reset"},
        {"outer": (0.7, 0.9)},
        {"replicate": True},
        {"on_nonfinite": "drop"},
        {"wire": "int8"},
    ):
        text = f"`{next(iter(option))}` has no effect with `strategy=ddp`; remove it"
        assert refused(method=MethodConfig(strategy="ddp", **option)) == text  # type: ignore[arg-type]
        for strategy in ("resist", "local_sgd", "diloco"):
            TrainConfig(method=MethodConfig(strategy=strategy, **option)).check()  # type: ignore[arg-type]
    assert "min_depth=2" in refused(method=MethodConfig(min_depth=2, capacities=(4, 4, 4, 4)))
    assert "`nesterov`" in refused(optimization=OptimizationConfig(nesterov=True, momentum=0.0))
    for name in ("mixup", "cutmix"):
        text = f"`{name}` has no effect with "
        mixed = OptimizationConfig(**{name: 0.2})  # type: ignore[arg-type]
        assert text + "`data=voc2007`" in refused(network=NetworkConfig(data="voc2007"), optimization=mixed)
        assert text + "`batch_size=1`" in refused(optimization=dataclasses.replace(mixed, batch_size=1))
        TrainConfig(optimization=mixed).check()
    for data in ("voc2007", "cifar10"):
        augmented = OptimizationConfig(rand_augment=(2, 9))
        assert "`rand_augment` has no effect" in refused(network=NetworkConfig(data=data), optimization=augmented)
        TrainConfig(network=NetworkConfig(data="folder"), optimization=augmented).check()


def test_the_digest_leaves_out_what_hosts_may_differ_in() -> None:
    other = dataclasses.replace(
        CHANGED,
        network=dataclasses.replace(CHANGED.network, data_dir=Path("/elsewhere")),
        run=dataclasses.replace(CHANGED.run, out=None),
    )
    assert other.digest() == CHANGED.digest()
    assert dataclasses.replace(CHANGED, run=RunConfig(seed=8)).digest() != CHANGED.digest()


def test_warm_up_switches_from_local_sgd() -> None:
    strategy = TrainConfig(method=MethodConfig(warmup_rounds=2)).strategy()
    assert [strategy.at(round).name for round in range(4)] == ["local_sgd", "local_sgd", "resist", "resist"]


def test_capacities_by_chain_and_by_round_are_texts() -> None:
    method = MethodConfig(
        workers=2,
        min_depth=3,
        capacities_by_chain=("layer3:1-22=11", "layer2=2,1"),
        capacities_by_round=("13=22", "5:layer3:1-22=12,14", "5:layer2=3"),
    )
    assert method.all_capacities() == Capacities(
        min_depth=3,
        by_chain={"layer3:1-22": 11, "layer2": (2, 1)},
        by_round={5: {"layer3:1-22": (12, 14), "layer2": 3}, 13: 22},
    )
    config = TrainConfig(method=method)
    config.check()
    assert from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.strategy().change_rounds == (0, 5, 13)
    assert TrainConfig().method.all_capacities() == Capacities()


def test_a_record_from_before_has_no_capacities_by_chain_or_round() -> None:
    data = TrainConfig(method=MethodConfig(capacities=(2, 1, 1, 4))).to_json()
    for name in ("capacities_by_chain", "capacities_by_round"):
        del data["method"][name]
    assert from_json(data).method == MethodConfig(capacities=(2, 1, 1, 4))


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"capacities_by_chain": ("layer3",)}, "`capacities_by_chain='layer3'` is not NAME=BLOCKS, as in layer3=6"),
        ({"capacities_by_chain": ("layer3=6,",)}, "`capacities_by_chain='layer3=6,'` is not NAME=BLOCKS"),
        ({"capacities_by_chain": ("layer3=" + 5000 * "9",)}, "is not NAME=BLOCKS"),
        ({"capacities_by_chain": ("layer3=0",)}, "`capacities=0` of chain layer3: it is less than 1"),
        ({"capacities_by_chain": ("layer3=1,2",)}, "`capacities=1 2` has 2 values for `workers=4`"),
        ({"capacities_by_chain": ("layer3=6", "layer3=7")}, "capacities of chain layer3 are given twice"),
        (
            {"capacities_by_round": ("layer3=6",)},
            "`capacities_by_round='layer3=6'` is not ROUNDS=BLOCKS or ROUNDS:NAME",
        ),
        ({"capacities_by_round": ("-1=6",)}, "is not ROUNDS=BLOCKS"),
        ({"capacities_by_round": ("3=6", "3=7")}, "`capacities_by_round` has 3=... twice; give it once"),
        ({"min_depth": 2, "capacities": (1, 1, 1, 1)}, "`min_depth=2` has no effect with `capacities`"),
        (
            {"strategy": "local_sgd", "capacities_by_round": ("3=6",)},
            "`capacities_by_round` has no effect with `strategy=local_sgd`; remove it",
        ),
        (
            {"strategy": "local_sgd", "redraw_every": 2},
            "`redraw_every` has no effect with `strategy=local_sgd`; remove it",
        ),
    ],
)
def test_capacities_of_another_form_are_refused(method: dict[str, object], text: str) -> None:
    assert text in refused(method=MethodConfig(**method))  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_read_or_refused_in_one_line(data: object) -> None:
    try:
        from_json(data)
    except UserError as error:
        assert "\n" not in str(error)


@given(
    st.sampled_from([(part, name) for part, values in TrainConfig().to_json().items() for name in values]),
    json_values,
)
def test_any_value_of_any_entry_is_read_or_refused_in_one_line(entry: tuple[str, str], value: object) -> None:
    part, name = entry
    try:
        config = from_json({part: {name: value}})
        config.check()
    except UserError as error:
        assert "\n" not in str(error)
