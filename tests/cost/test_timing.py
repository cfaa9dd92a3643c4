"""Seconds: by hand, by calibration, and within bounds."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from cost_cases import CHAIN, MOMENTUM, SIZES, SMALL, timed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist.cli import main
from resist.cost import Link, Row, Speed, calibrate, predict
from resist.cost.links import Links
from resist.cost.timing import PAYLOAD, ddp_step_s, exchange_s, fragments_s, median_step_s
from resist.cost.traffic import RoundTraffic, ddp_traffic, round_traffic
from resist.errors import UserError
from resist.models import PreActResNet
from resist.planning.fragments import fragment_times
from resist.planning.strategy import ddp, local_sgd, resist
from resist.planning.wire import Wire
from support import tiny

MEGABYTE_S = 8e6 / 1e9 / PAYLOAD  # the line rate in Gbit/s that carries 1e6 bytes of payload a second


def test_seconds_of_local_sgd_by_hand() -> None:
    report = timed([local_sgd(2, 10)], Link(MEGABYTE_S, 100), Speed(80))
    numel = sum(t.numel() for t in tiny().state_dict().values() if t.is_floating_point())
    seconds = report.rows[0].seconds
    assert seconds is not None
    assert seconds.compute == pytest.approx(10 * 4 / 80)
    assert seconds.exchange == pytest.approx(numel * 8 / 1e6 + 2 * 0.1)  # a ring of two: all of it, in two hops
    assert seconds.images_s == pytest.approx(2 * 4 * 10 / seconds.round)
    assert report.speedups(report.rows[0]) == {"one machine": pytest.approx(seconds.images_s / 80)}


def test_seconds_of_ddp_by_hand() -> None:
    """A third of a step is forward. A quick exchange hides in the rest; a slow one takes the place of it."""
    numel = sum(p.numel() for p in tiny().parameters())
    for images_s in (1e-3, 1e6):
        report = timed([ddp(2, 10)], Link(MEGABYTE_S), Speed(images_s), batchnorm="batch")
        seconds, step_s, full = report.rows[0].seconds, 4 / images_s, report.full
        backward = step_s * (1 - full.forward_flops / full.training_flops)
        assert seconds is not None
        assert seconds.round / 10 == pytest.approx(step_s - backward + max(backward, numel * 8 / 1e6))
        assert seconds.hidden / 10 == pytest.approx(min(backward, numel * 8 / 1e6))


def fragments(encoded: int, allreduces: int) -> RoundTraffic:
    """Two fragments of 1 MB a worker, and 0.5 MB more at the end of the round."""
    return RoundTraffic(
        {}, 2_500_000, allreduces, {}, {}, compressed=encoded, scattered=1_000_000 if encoded else 0,
        fragments=(1_000_000, 1_000_000),
    )  # fmt: skip


@pytest.mark.parametrize("step_s", [0.01, 0.3, 5.0])
def test_fragments_wait_for_what_steps_do_not_hide(step_s: float) -> None:
    """Of a compressed mean the first half has two of three steps, the second half the third one."""
    links, times = Links((Link(MEGABYTE_S, 100),)), fragment_times(10, 2, 3)
    waited, hidden = fragments_s(fragments(0, 3), links, 2, times, step_s)
    whole = 1 + 2 * 0.1  # two hops of a ring of two
    assert waited == pytest.approx(2 * max(0, whole - 3 * step_s))
    assert waited + hidden == pytest.approx(2 * whole)
    assert exchange_s(fragments(0, 3), links, 2) == pytest.approx(0.5 + 2 * 0.1)
    waited, hidden = fragments_s(fragments(2, 1), links, 2, times, step_s)
    half = 0.5 + 0.1
    assert waited == pytest.approx(2 * (max(0, half - 2 * step_s) + max(0, half - step_s)))
    assert waited + hidden == pytest.approx(4 * half)
    assert exchange_s(fragments(2, 1), links, 2) == pytest.approx(0.5 + 2 * 0.1)


def test_fragments_send_as_much_and_stall_less() -> None:
    network, rows = (lambda: PreActResNet((1, 1, 5, 1), 5, width=4)), list[Row]()
    for wire in (Wire("int8"), Wire("int8", fragments=2)):
        report = predict(
            network,
            [local_sgd(2, 10)],
            wire=wire,
            link=Link(MEGABYTE_S),
            speed=Speed(80),
            **SMALL,  # type: ignore[arg-type]
        )
        rows += report.rows
    whole, pieces = ((row.seconds, row.traffic.total_bytes) for row in rows)
    assert pieces[1] == pytest.approx(whole[1], rel=0.1)
    assert whole[0] is not None
    assert pieces[0] is not None
    assert pieces[0].stall < 0.7 * whole[0].stall
    assert pieces[0].exchange + pieces[0].hidden == pytest.approx(whole[0].exchange, rel=0.1)
    assert rows[1].networks[0].memory.changes > rows[0].networks[0].memory.changes
    with pytest.raises(UserError, match="`fragments=6` needs at least 12 steps in a round"):
        predict(network, [local_sgd(2, 10)], wire=Wire(fragments=6), **SMALL)  # type: ignore[arg-type]


def test_the_slowest_worker_decides() -> None:
    """The worker with half the speed holds two of six blocks, and is still the last."""
    strategies = [resist(2, 10, capacities=(6, 2))]
    report = timed(strategies, Link(1), [Speed(80), Speed(10)])
    seconds, (large, little) = report.rows[0].seconds, report.rows[0].networks
    assert seconds is not None
    assert (large.blocks, little.blocks) == ((6,), (2,))
    assert seconds.compute == pytest.approx(10 * 4 / 10 * little.training_flops / large.training_flops)
    fixed = timed(strategies, Link(1), [Speed(80, 0.5), Speed(10, 0.5)]).rows[0].seconds
    assert fixed is not None
    assert fixed.compute == pytest.approx((seconds.compute + 10 * 4 / 10) / 2)


@given(st.floats(1e-3, 100), st.floats(1, 10), st.floats(0, 100), st.floats(0, 100), st.integers(1, 4))
@settings(max_examples=50)
def test_a_better_link_is_never_slower(rate: float, factor: float, latency: float, more: float, workers: int) -> None:
    better, worse = Links((Link(rate * factor, latency),)), Links((Link(rate, latency + more),))
    strategy = resist(workers, optimizer_state="average")
    plans = [strategy.plan([CHAIN], seed=0, round=number) for number in (0, 1)]
    apart = round_traffic(SIZES, plans[0], plans[1], strategy=strategy, state=MOMENTUM)
    assert exchange_s(apart, better, workers) <= exchange_s(apart, worse, workers) * (1 + 1e-9)
    every_step = ddp_traffic(SIZES, workers=workers, local_steps=5)
    quick, slow = (sum(ddp_step_s(every_step, link, workers, 5, 0.1, 0.3)) for link in (better, worse))
    assert quick <= slow * (1 + 1e-9)
    assert (slow == 0) == (workers == 1)


class Clock:
    """Time that passes only where a network takes its time, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class Sleepy(nn.Module):
    """A chain whose blocks take `block_s`, and a head without FLOPs that takes `head_s`."""

    def __init__(self, block_s: float, head_s: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(SleepyBlock(block_s) for _ in range(6)))
        self.head_s = head_s

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.sleep(self.head_s)
        return self.blocks(x)


class SleepyBlock(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.conv, self.seconds = nn.Conv2d(2, 2, 1), seconds

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.sleep(self.seconds)
        return x + self.conv(x)


@pytest.mark.parametrize(("block_s", "head_s"), [(0.02, 0.0), (0.01, 0.06), (0.0, 0.1)])
def test_calibration_tells_what_does_not_follow_flops(
    monkeypatch: pytest.MonkeyPatch, block_s: float, head_s: float
) -> None:
    monkeypatch.setattr("resist.cost.timing.time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
    speed = calibrate(lambda: Sleepy(block_s, head_s), batch_size=3, image_shape=(2, 4, 4), steps=3)
    assert 3 / speed.images_s == pytest.approx(6 * block_s + head_s)
    assert speed.fixed == pytest.approx(head_s / (6 * block_s + head_s), abs=0.06)


def test_the_first_step_is_timed_after_the_device_has_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU works on while the host reads the clock: before each reading, this process waits for it."""
    events: list[str] = []

    def step(model: nn.Module, images: Tensor) -> Tensor:
        events.append("step")
        return model(images).sum()

    def read() -> float:
        events.append("clock")
        return float(len(events))

    monkeypatch.setattr("resist.cost.timing.time", SimpleNamespace(perf_counter=read))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait for {device}"))
    model = nn.Linear(2, 2)
    images = SimpleNamespace(device=torch.device("cuda:1"), is_cuda=True)
    median_step_s(model, torch.optim.SGD(model.parameters(), lr=0.1), images, lambda m, _: step(m, torch.ones(1, 2)), 2)  # type: ignore[arg-type]
    once = ["step", "wait for cuda:1", "clock"]
    assert events == [*once[1:], *once, *once]


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_rates_are_above_zero(rate: float) -> None:
    with pytest.raises(UserError, match="`link_gbit_s="):
        Link(rate)
    with pytest.raises(UserError, match="`images_s="):
        Speed(rate)
    if rate != 0:
        with pytest.raises(UserError, match="latency_ms="):
            Link(1, rate)


def test_other_bounds() -> None:
    with pytest.raises(UserError, match="fixed=1"):
        Speed(1, 1)
    with pytest.raises(UserError, match="steps=0"):
        calibrate(tiny, batch_size=2, image_shape=(3, 8, 8), steps=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_command_calibrates_in_the_precision_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    seen: list[torch.dtype] = []

    def calibrated(build_model: object, *, loss: Callable[[nn.Module, Tensor], Tensor], **_: object) -> Speed:
        layer = nn.Linear(2, 2)
        layer.register_forward_hook(lambda _layer, _args, output: seen.append(output.dtype))
        loss(layer, torch.ones(1, 2)).backward()
        return Speed(100)

    monkeypatch.setattr("resist.cost.calibrate", calibrated)
    network = ["--data", "digits", "--model-args", "depths=1,1,5,1", "width=4", "--strategies", "local_sgd"]
    measured = ["--workers", "2", "--link-gbit-s", "1", "--calibrate", "--device", "cpu", "--precision", precision]
    with pytest.raises(SystemExit) as ended:
        main(["cost", *network, *measured])
    assert ended.value.code == 0, capsys.readouterr().err
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
