"""Links of unequal rates: what decides, what is measured, and the file of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_cases import CHAIN, MOMENTUM, SIZES, timed
from hypothesis import given
from hypothesis import strategies as st

from commands import Commands
from pool import Pool
from resist.blocks.chains import choose_chains
from resist.cli.probe import ProbeConfig, run_probe
from resist.cost import Link, Speed
from resist.cost.footprint import build_on_meta
from resist.cost.links import PAYLOAD, Links, Measured, read_links
from resist.cost.probe import measure_links
from resist.cost.sizes import sizes_of
from resist.cost.timing import exchange_s
from resist.cost.traffic import RoundTraffic, round_traffic
from resist.errors import UserError
from resist.models import PreActResNet
from resist.planning.strategy import local_sgd, resist
from resist.planning.wire import Wire
from resist.sync.distributed import connect

MEASURED = Measured(
    backend="gloo",
    device="cpu",
    hosts=("a", "b", "c"),
    gbit_s={(0, 1): 0.9, (1, 0): 0.8, (0, 2): 0.1, (2, 0): 0.1, (1, 2): 0.1, (2, 1): 0.05},
    latency_ms={(0, 1): 1.0, (0, 2): 20.0, (1, 2): 25.0},
    ring_gbit_s=(0.08, 0.08, 0.09),
    to_all_gbit_s=(0.06, 0.05, 0.05),
)


def written(folder: Path, content: object) -> Path:
    file = folder / "links.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_the_rate_of_a_link_is_that_with_its_fastest_peer() -> None:
    """Worker 2 is behind a slow link; the others are slow with it, and fast with each other."""
    assert [MEASURED.best_gbit_s("out", worker) for worker in range(3)] == [0.9, 0.8, 0.1]
    assert [MEASURED.best_gbit_s("in", worker) for worker in range(3)] == [0.8, 0.9, 0.1]
    assert [MEASURED.latency_of(worker) for worker in range(3)] == [20, 25, 25]
    assert MEASURED.remaining(MEASURED.ring_gbit_s) == pytest.approx(0.8)
    assert MEASURED.remaining((9.0, 9.0, 9.0)) == 1


def test_a_file_has_what_was_measured(tmp_path: Path) -> None:
    links = read_links(written(tmp_path, MEASURED.to_json()))
    payload = [[link.bytes_s(way) * 8 / 1e9 for way in ("out", "in")] for link in links.each]
    assert payload == [pytest.approx([0.72, 0.64]), pytest.approx([0.64, 0.72]), pytest.approx([0.08, 0.08])]
    assert [link.latency_ms for link in links.each] == [20, 25, 25]
    assert links.to_all == pytest.approx(0.05 / 0.08)
    assert links.slowest_bytes_s == pytest.approx(0.08e9 / 8)
    assert links.latency_s == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("[", "is damaged"),
        ("[1]", "is not a file of measured links"),
        ({"format": "resist probe 2"}, "is not a file of measured links"),
        ({"links": {}}, "its links are not a list"),
        ({"links": []}, "its links are not a list"),
        ({"links": [1, 2]}, "out_gbit_s of worker 0 is null"),
        ({"out_gbit_s": 0}, "out_gbit_s of worker 1 is 0; must be from 1e-09 to 1e+09"),
        ({"in_gbit_s": 5e-324}, "in_gbit_s of worker 1 is 5e-324; must be from 1e-09"),
        ({"in_gbit_s": float("nan")}, "in_gbit_s of worker 1 is NaN"),
        ({"in_gbit_s": float("inf")}, "in_gbit_s of worker 1 is Infinity"),
        ({"out_gbit_s": True}, "out_gbit_s of worker 1 is true"),
        ({"out_gbit_s": "fast"}, 'out_gbit_s of worker 1 is "fast"'),
        ({"out_gbit_s": 10**400}, "out_gbit_s of worker 1 is 1000"),
        ({"latency_ms": -1}, "latency_ms of worker 1 is -1; must be from 0"),
        ({"to_all_share": 2}, "to_all_share is 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    content: dict[str, Any] = MEASURED.to_json()
    if isinstance(change, str):
        content_or_text: object = change
    else:
        inside = content["links"][1] if change.keys() <= content["links"][1].keys() else content
        inside.update(change)
        content_or_text = content
    with pytest.raises(UserError) as refused:
        read_links(written(tmp_path, content_or_text))
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="give a file that resist probe has written"):
            read_links(path)


def traffic(workers: int, wire: Wire | None = None) -> RoundTraffic:
    strategy, sizes = resist(workers, optimizer_state="average"), SIZES
    chains = [CHAIN]
    if wire is not None:  # of single precision, which formats encode
        template = build_on_meta(lambda: PreActResNet((1, 1, 7, 1), 5, width=4))
        chains = list(choose_chains(template))
        sizes = sizes_of(template, chains)
    plans = [strategy.plan(chains, seed=0, round=number) for number in (0, 1)]
    return round_traffic(sizes, plans[0], plans[1], strategy=strategy, state=MOMENTUM, wire=wire)


@given(st.lists(st.floats(1e-3, 10), min_size=3, max_size=3), st.integers(0, 2), st.floats(1, 10))
def test_a_faster_link_is_never_worse_and_equal_ones_are_one(rates: list[float], which: int, factor: float) -> None:
    own, one = traffic(3), Link(rates[0], 1)
    assert exchange_s(own, Links((one,) * 3), 3) == pytest.approx(exchange_s(own, Links((one,)), 3))
    slow = [Link(rate, 1) for rate in rates]
    fast = [Link(rate * factor if worker == which else rate, 1) for worker, rate in enumerate(rates)]
    assert exchange_s(own, Links(tuple(fast)), 3) <= exchange_s(own, Links(tuple(slow)), 3) * (1 + 1e-9)
    bounds = [exchange_s(own, Links((Link(rate, 1),)), 3) for rate in (max(rates), min(rates))]
    assert bounds[0] * (1 - 1e-9) <= exchange_s(own, Links(tuple(slow)), 3) <= bounds[1] * (1 + 1e-9)


def test_directions_count_apart() -> None:
    phase: Mapping[tuple[str, int], int] = {("out", 0): 1000, ("in", 1): 1000}
    megabyte_s = 8e6 / 1e9 / PAYLOAD
    fast, slow_in = Link(megabyte_s), Link(megabyte_s, 0, megabyte_s / 10)
    assert Links((slow_in, fast)).seconds(phase) == pytest.approx(1e-3)
    assert Links((fast, slow_in)).seconds(phase) == pytest.approx(1e-2)
    assert Links((fast, slow_in)).slowest_bytes_s == pytest.approx(1e5)


def test_sending_to_all_counts_in_compressed_means_only() -> None:
    free, shared = Links((Link(1),)), Links((Link(1),), to_all=0.5)
    assert exchange_s(traffic(3), free, 3) == exchange_s(traffic(3), shared, 3)
    own = traffic(3, Wire(shared="int8"))
    assert 0 < own.scattered <= own.ring_bytes / 2
    more = exchange_s(own, shared, 3) - exchange_s(own, free, 3)
    assert more == pytest.approx(own.scattered / free.slowest_bytes_s)


def test_one_link_for_all_or_one_for_each() -> None:
    equal = timed([local_sgd(2, 10)], Link(1), Speed(80)).rows[0].seconds
    one_slow = timed([local_sgd(2, 10)], Links((Link(1), Link(0.5))), Speed(80)).rows[0].seconds
    assert equal is not None
    assert one_slow is not None
    assert one_slow.exchange == pytest.approx(2 * equal.exchange)
    assert one_slow.stall == pytest.approx(one_slow.exchange / one_slow.round)
    with pytest.raises(UserError, match="3 links for 2 workers; give one for each worker"):
        timed([local_sgd(2, 10)], Links((Link(1),) * 3), Speed(80))


def measured() -> Measured:
    transport = connect(3, "cpu", 60)
    try:
        return measure_links(transport, torch.device("cpu"), 1.0)
    finally:
        transport.close()


@pytest.mark.slow
def test_processes_measure_the_same(pool: Pool) -> None:
    one, *others = pool.run(3, measured)
    assert all(other == one for other in others)
    assert set(one.gbit_s) == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert set(one.latency_ms) == {(0, 1), (0, 2), (1, 2)}
    values = [*one.gbit_s.values(), *one.latency_ms.values(), *one.ring_gbit_s, *one.to_all_gbit_s]
    assert len(values) == 6 + 3 + 3 + 3
    assert all(0 < value < 10_000 for value in values)


def test_probe_does_not_measure_for_a_folder_that_it_may_not_write_to(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="is not a folder that you may write to; give another file"):
        run_probe(ProbeConfig(processes=2, out=tmp_path / "links.json"), frozenset())


@pytest.mark.slow
def test_probe_writes_what_cost_takes(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    done = commands.run("probe", "--processes", "2", "--device", "cpu", "--out", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 processes; gloo, from the memory of the host" in done.stdout
    assert done.stdout.rstrip().endswith(f"wrote {file}")
    assert len(read_links(file).each) == 2
    again = commands.run("probe", "--processes", "2", "--device", "cpu", "--out", str(file))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
