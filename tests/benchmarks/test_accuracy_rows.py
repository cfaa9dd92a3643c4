"""The accuracy benchmark: rows that can be compared, and differences with their uncertainty."""

import math
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import accuracy_figure
import cifar10
import cifar10_rows
import paired
import sizes
from cifar10_rows import BASE, ROWS, SETTINGS, Skipped
from resist.data import Images
from resist.planning.wire import Wire


def images(num: int, size: int = 32) -> Images:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num, 3, size, size), generator=random, dtype=torch.uint8)
    return Images(pixels, torch.arange(num) % 10, 10, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_has_a_strategy_for_every_setting(row) -> None:
    for setting in SETTINGS.values():
        rounds = max(1, round(setting.rounds * row.share))
        strategy = row.strategy(row, rounds)
        assert (strategy.workers, strategy.at(rounds - 1).local_steps) == (
            row.workers,
            1 if "every step" in row.name else row.local_steps,
        )
    assert row.at_rate(2.0).lr == 2 * row.lr
    assert row.at_rate(2.0).name != row.name


def test_a_skipped_block_passes_its_input_and_is_scaled_in_tests() -> None:
    block = Skipped(torch.nn.Identity(), survival=0.25)  # the branch of a block that returns x is zero
    doubled = Skipped(torch.nn.Upsample(scale_factor=1), survival=0.25)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(block.eval()(x), x)

    class Adds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    doubled.block = Adds()
    torch.manual_seed(0)
    added = [float((doubled(x) - x).mean()) for _ in range(400)]
    assert sum(added) / 400 == pytest.approx(0.25, abs=0.07)
    assert torch.allclose(doubled.eval()(x), x + 0.25)


@pytest.mark.slow
def test_the_rate_ends_at_zero_and_rows_of_a_seed_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *args: (rates.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    monkeypatch.setattr(cifar10, "accuracy", lambda model, test, num: 0.0)
    monkeypatch.setattr(cifar10, "recalibrate", lambda *args: None)
    data = cifar10.smaller(images(64), 8)
    assert data.pad == 1
    setting = cifar10.replace(SETTINGS["screen"], rounds=3, image_size=8, batch_size=4)
    row = cifar10.replace(ROWS[BASE], depths=(1, 1, 3, 1), local_steps=1)
    first = cifar10.trained(setting, row, 0, data, data)
    assert rates[0] == pytest.approx(setting.lr)
    assert rates[-1] == 0.0
    assert first == {**cifar10.trained(setting, row, 0, data, data), "train_cpu_s": first["train_cpu_s"]}


@pytest.mark.nightly
def test_a_teacher_changes_the_training_and_scales_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "recalibrate", lambda *args: None)
    data = cifar10.smaller(images(64), 8)
    setting = cifar10.replace(SETTINGS["screen"], rounds=2, image_size=8, batch_size=4)
    ends: list[list[float]] = []
    seen: list[float] = []
    monkeypatch.setattr(
        cifar10,
        "accuracy",
        lambda model, test, num: (seen.append(float(model(test.images[:4].float()).detach().sum())), 0.0)[1],
    )
    for every in (0, 1):
        seen.clear()
        row = cifar10.replace(
            ROWS["ResIST, average"], depths=(1, 1, 9, 1), teacher_every=every, scales=(0.5, 1.0), local_steps=2
        )
        result = cifar10.trained(setting, row, 0, data, data)
        assert list(result["percent"]) == ["averaged", "re-estimated", "sub-network", "scale x 0.5", "scale x 1"]
        assert seen[-1] == seen[-4] != seen[-2]  # the scale of ResIST, and another
        ends.append(list(seen))
    assert ends[0][-1] != ends[1][-1]


def test_images_in_folders_are_read_class_by_class_and_all_of_a_small_set_are_tested(tmp_path) -> None:
    for part, num in (("train", 3), ("val", 2)):
        for label, color in enumerate((40, 200)):
            folder = tmp_path / "small" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(num):
                Image.new("RGB", (16, 16), (color, 0, 0)).save(folder / f"{number}.png")
    train, test = cifar10.images_of(cifar10_rows.Setting("small", 8, 1, data="small"), str(tmp_path))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert train.images.shape == (6, 3, 16, 16)
    assert (train.mean, train.pad, train.num_classes) == (test.mean, 2, 2)
    assert train.mean == pytest.approx((120 / 255, 0, 0))

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([-x[:, 0].mean((1, 2)), x[:, 0].mean((1, 2))], 1)

    assert cifar10.accuracy(Bright(), cifar10.smaller(test, 8), 5000) == 100.0
    assert ROWS[BASE].network(7)(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_the_blocks_of_a_chain_can_begin_as_the_identity() -> None:
    section = ROWS["ResIST, chain begins as the identity"].network().get_submodule("layer3")
    assert isinstance(section, torch.nn.Sequential)
    x = torch.randn(2, 32, 4, 4)
    assert all(torch.equal(block.eval()(x), x) for block in section[1:])


def test_a_narrower_share_of_blocks_costs_less() -> None:
    torch.set_num_threads(1)
    row = ROWS["stochastic depth, averaging in every step"]
    full, part = ROWS[BASE].network(), row.network()
    assert 0.4 < cifar10.gmacs(part, 16) / cifar10.gmacs(full, 16) < 0.6
    before = {name: value.clone() for name, value in full.named_buffers()}
    cifar10.gmacs(full, 16)
    assert all(torch.equal(value, before[name]) for name, value in full.named_buffers())


def test_differences_are_paired_by_seed() -> None:
    found = paired.difference({0: 61.0, 1: 63.0, 2: 62.0, 9: 0.0}, {0: 60.0, 1: 61.0, 2: 61.5})
    assert (round(found.mean, 6), found.seeds) == (1.166667, 3)
    assert found.error == pytest.approx(0.763763 / math.sqrt(3), rel=1e-5)  # s / sqrt(n)
    assert found.mean - found.low == pytest.approx(4.302653 * found.error, rel=1e-5)  # t(0.975, 2)
    assert found.cells() == ["+1.17 ± 0.44", "-0.73"]
    assert paired.difference({0: 1.0}, {0: 0.5}) == (0.5, math.inf, -math.inf, 1)
    assert paired.difference({0: 1.0}, {0: 0.5}).cells() == ["+0.50", ""]
    assert paired.difference({0: 1.0}, {1: 0.5}).cells() == ["", ""]


def test_the_summary_leaves_out_the_bytes_of_tests() -> None:
    def run(row: str, seed: int, percent: float, sent: int, plain: str = "") -> dict[str, object]:
        return {"row": row, "seed": seed, "plain": plain, "percent": {"averaged": percent}, "gmac": 10,
                "peak_bytes": 5, "train_cpu_s": 3.0, "rounds": 4,
                "bytes": {"shared": sent, "evaluate": 99}}  # fmt: skip

    text = paired.summary(
        [
            run(BASE, 0, 60, 10), run(BASE, 1, 62, 10), run("x", 0, 61, 5), run("x", 1, 63, 5),
            run("x, int8", 0, 61, 2, "x"), run("x, int8", 1, 62, 2, "x"),
        ],
        BASE,
    )  # fmt: skip
    assert "| x | 62.00 | 2 | +1.00 ± 0.00 | +1.00 |  |  |  |  | 1.00 | 1.00 | 0.50 | 1.00 |" in text
    assert (
        "| x, int8 | 61.50 | 2 | +0.50 ± 0.50 | -5.85 |  |  | -0.50 ± 0.50 | -6.85 | 1.00 | 1.00 | 0.20 | 1.00 |"
        in text
    )


def test_fewer_pairs_than_seeds_are_said() -> None:
    values, base = {seed: seed + 60.0 for seed in range(3)}, {0: 60.0, 1: 60.0}
    assert paired.difference(values, base).cells(of=3) == ["+0.50 ± 0.50 (2)", "-5.85"]
    assert paired.difference(values, base).cells(of=2) == ["+0.50 ± 0.50", "-5.85"]


def test_compressed_rows_are_compared_with_the_same_row_in_fp32() -> None:
    compressed = [row for row in ROWS.values() if row.plain]
    known = {BASE, "ResIST, average", cifar10_rows.SELDOM, cifar10_rows.DILOCO.name}
    assert {ROWS[row.plain].name for row in compressed} == known
    for row in compressed:
        plain = ROWS[row.plain]
        assert row.wire != plain.wire == Wire()
        assert cifar10.replace(row, name=plain.name, wire=plain.wire, plain="", strategy=plain.strategy) == plain
        assert row.at_rate(2.0).plain == plain.at_rate(2.0).name
        row.wire.times(row.local_steps)  # an error if the round is too short
    assert len({(row.plain, row.wire) for row in compressed}) == len(compressed)


@pytest.mark.nightly
def test_a_row_trains_in_its_wire_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "accuracy", lambda model, test, num: 0.0)
    monkeypatch.setattr(cifar10, "recalibrate", lambda *args: None)
    data = cifar10.smaller(images(64), 8)
    setting = cifar10.replace(SETTINGS["screen"], rounds=1, image_size=8, batch_size=2)
    plain, coded, streamed = (
        paired.cost(cifar10.trained(setting, cifar10.replace(ROWS[name], **small), 0, data, data)["bytes"])
        for small in ({"depths": (1, 1, 3, 1), "scales": (), "local_steps": 10},)
        for name in ("local SGD", "local SGD, int8", "local SGD, int8, 5 fragments, late by 1 step")
    )
    assert 0.25 < coded / plain < 0.5
    assert coded < streamed < 1.2 * coded  # whole groups of each fragment


def test_a_round_of_more_steps_costs_no_more_than_one_of_local_sgd() -> None:
    torch.set_num_threads(1)
    full, part = ROWS[BASE], ROWS[f"ResIST, {cifar10_rows.SAME_COMPUTE} steps a round"]
    held = cifar10.replace(part, depths=(3, 4, cifar10_rows.HELD + 1, 3))  # the network of one worker
    work = [cifar10.gmacs(row.network(), 16) * row.local_steps for row in (held, full)]
    assert 0.8 * work[1] < work[0] <= work[1]


@pytest.mark.slow
def test_memory_is_that_of_the_largest_part_of_a_run() -> None:
    torch.set_num_threads(1)
    setting = cifar10.replace(SETTINGS["screen"], batch_size=8)
    part, whole, both = (
        cifar10.peak_bytes(setting, cifar10.replace(ROWS[name], depths=(1, 1, 12, 1)))
        for name in ("ResIST, average", BASE, "ResIST after 10 % of local SGD")
    )
    assert 0.6 * whole < part < whole == both


def test_at_equal_time_the_base_has_fewer_rounds() -> None:
    curve = {1.0: {0: 70.0, 1: 72.0, 2: 71.0}, 0.5: {0: 60.0, 1: 64.0}}
    assert paired.at_cost(curve, 0.75) == {0: 65.0, 1: 68.0}
    assert paired.at_cost(curve, 1.0) == {0: 70.0, 1: 72.0}
    assert paired.at_cost(curve, 0.4) == paired.at_cost(curve, 1.1) == {}  # nothing is extrapolated
    assert paired.at_cost({1.0: {0: 70.0}}, 1.0) == {}
    assert paired.at_cost({**curve, 0.75: {0: 66.0}}, 0.625) == {0: 63.0, 1: 66.0}  # each seed by its own points


def costly(row: str, seed: int, percent: float, cost: float, sent: int = 10, plain: str = "") -> dict[str, object]:
    return {"setting": "long", "row": row, "seed": seed, "percent": {"averaged": percent}, "gmac": cost, "plain": plain,
            "train_cpu_s": cost, "rounds": round(10 * cost), "bytes": {"shared": sent}, "peak_bytes": cost}  # fmt: skip


def test_a_row_is_compared_with_as_much_time_of_local_sgd() -> None:
    runs = [
        costly(row, seed, percent + 0.5 * seed, cost)
        for row, percent, cost in ((BASE, 70.0, 1.0), (f"{BASE}, 60 % of the rounds", 60.0, 0.6), ("x", 67.0, 0.8))
        for seed in range(3)
    ]
    lines = paired.summary(runs, BASE).splitlines()
    (x,) = (line for line in lines if line.startswith("| x "))
    assert x.startswith(
        "| x | 67.50 | 3 | -3.00 ± 0.00 | -3.00 | +2.00 ± 0.00 | +2.00 |  |  | 0.80 | 0.80 | 1.00 | 0.80"
    )
    assert all(line.split("|")[4:8] == ["  "] * 4 for line in lines if line.startswith(f"| {BASE}"))


def test_the_figure_has_a_mark_for_each_row_with_three_seeds() -> None:
    rows = {BASE: 1.0, f"{BASE}, 60 % of the rounds": 0.6, "<x>": 0.8, "sends more": 1.0}
    runs = [costly(row, seed, 60 + seed, cost, 10 + 990 * (row == "sends more")) for row, cost in rows.items()
            for seed in range(3)]  # fmt: skip
    runs += [costly("x, int8", seed, 60.0, 0.8, plain="x") for seed in range(3)]
    runs += [costly("one seed", 0, 60.0, 0.8)]
    root = ElementTree.fromstring(accuracy_figure.figure(runs))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}circle")) == len(rows) * (len(accuracy_figure.PANELS) + 1)
    texts = [str(text.text) for text in root.findall(f"{name}text")]
    assert {text for text in texts if "±" in text} == {f"{row}: 61.0 ± 0.6" for row in rows}
    assert "bytes sent, logarithmic" in texts
    assert "compute" in texts
    assert accuracy_figure.points_of(runs[:2]) == []


def test_methods_are_compared_at_equal_sizes() -> None:
    runs = [
        costly(row, seed, percent + 0.5 * seed, cost)
        for row, percent, cost in (
            (BASE, 60.0, 1.0), ("ResIST, average", 59.0, 0.6), (f"{BASE}, S = 8", 66.0, 2.0),
            ("ResIST, average, S = 8", 67.0, 1.0), (f"{BASE}, l = 50", 55.0, 1.0),
        )
        for seed in range(3)
    ]  # fmt: skip
    runs.append(costly("ResIST, average", 3, 99.0, 9.0))  # a seed that local SGD does not have
    lines = sizes.size_table(runs).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 4", "25"], ["| 8", "25"]]  # l = 50: no pair
    assert "| 60.50 | 59.50 | -1.00 ± 0.00 | -1.00 | 3 | 0.60 |" in lines[2]
    assert "| 66.50 | 67.50 | +1.00 ± 0.00 | +1.00 | 3 | 0.50 |" in lines[3]
    assert sizes.size_table([run for run in runs if "S = 8" not in run["row"]]) == ""
    root, name = ElementTree.fromstring(sizes.size_figure(runs)), "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.findall(f"{name}text")]
    assert {"workers, S", "4", "8"} <= set(texts)
    assert "local steps, l" not in texts
    assert len(root.findall(f"{name}circle")) == 4 + 2
    assert sizes.size_figure(runs[:6]) == ""
