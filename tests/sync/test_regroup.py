"""`Job.regroup`: whoever is lost at whatever point, the members that are left go on with a complete network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regrouped import NETWORK, STEPS, Cluster, State, adam, close, merged, network, sgd
from resist.errors import AgreedError, DivergedError, IncompleteNetworkError, UserError, WorkerLostError
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch
from resist.planning.wire import Wire, as_wire
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local
from resist.sync.target import Regrouped
from threaded import Threaded, Wires, in_threads

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single holders": lambda: resist(4, STEPS, min_depth=0),
    "several holders": lambda: resist(4, STEPS, min_depth=3),
    "unequal": lambda: resist(4, STEPS, capacities=(3, 1, 1, 2)),
    "local SGD": lambda: local_sgd(4, STEPS),
}
STREAMED = Wire(**as_wire("int4").formats, fragments=1, delay=1)
ROUND_EVENTS = 9  # events of one process in a round of `resist`, with the last text that ends it


def expected(cluster: Cluster, found: Regrouped, before: dict[int, State]) -> State:
    """The network as the rule has it, from what each worker had and what rounds began with.

    Who was lost at the very end of a round has not seen the next one begin: then only a part of it is known.
    """
    former = found.generation - 1
    if (began := cluster.history.get((former, found.round))) is not None:
        return merged(list(began.values()), complete=found.repeated)
    assert not found.repeated
    network: State = {}
    for name, start in merged(list(cluster.history[former, found.round - 1].values())).items():
        copies = [state[name] for state in before.values() if name in state]
        network[name] = torch.stack(copies).mean(0) if copies else start
    return network


def check_rule(cluster: Cluster, found: Regrouped, before: dict[int, State]) -> None:
    wanted, full = expected(cluster, found, before), cluster.full()
    close({name: full[name] for name in wanted}, wanted)


def check(cluster: Cluster, results: list[Any]) -> Regrouped:
    """What holds after every regroup, whatever came before."""
    found = results[0]
    assert isinstance(found, Regrouped), found
    assert all(result == found for result in results)
    for member in cluster.members:
        job = member.job
        assert (job.generation, job.round, job.step_index) == (found.generation, found.round, found.step)
        assert job.strategy.workers == job.transport.num_workers == found.workers
        assert job.plan == job.plan_of(job.round)
        assert not job.torn
    full = cluster.full()
    assert all(bool(tensor.isfinite().all()) for tensor in full.values())
    return found


def go_on(cluster: Cluster, rounds: int = 2) -> None:
    before = cluster.full()
    assert set(cluster.train(rounds * STEPS)) == {None}
    after = cluster.full() if not cluster.members[0].job.wire.fragments else cluster.states()[0]
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "victim"), [("single holders", 0), ("several holders", 2), ("unequal", 2), ("local SGD", 0)]
)
def test_a_worker_that_is_lost_at_any_point_of_a_round(name: str, victim: int) -> None:
    repeated: set[bool] = set()
    for event in range(1, ROUND_EVENTS + 1):
        cluster = Cluster(STRATEGIES[name]())
        assert set(cluster.train(STEPS + 1)) == {None}
        losses = cluster.train(2 * STEPS, {victim: event})
        assert len(losses) == 3
        assert all(isinstance(loss, WorkerLostError) for loss in losses)
        before = cluster.states()
        torn = [member.job.torn for member in cluster.members]
        at = {member.job.round for member in cluster.members}
        found = check(cluster, cluster.regroup())
        assert found.workers == 3
        assert found.lost == (victim,)
        assert found.joined == () or any(torn)
        if not any(torn) and len(at) == 1:
            assert not found.repeated
        repeated.add(found.repeated)
        check_rule(cluster, found, before)
        go_on(cluster)
    assert repeated == {False, True}


@pytest.mark.slow
def test_without_a_loss_it_is_an_ordinary_synchronization() -> None:
    for make in (*STRATEGIES.values(), lambda: resist(4, STEPS, min_depth=3, outer=OuterSGD())):
        one, two = Cluster(make(), averaged=True), Cluster(make(), averaged=True)
        for cluster in (one, two):
            cluster.train(STEPS + 1)
        one._run([member.job.synchronize for member in one.members])
        found = check(two, two.regroup())
        assert (found.round, found.step, found.lost, found.recovered) == (2, STEPS + 1, (), ())
        for cluster in (one, two):
            cluster.train(3 * STEPS)
        for averaged in (False, True):
            mine, theirs = one.states(averaged=averaged), two.states(averaged=averaged)
            for worker, state in mine.items():
                close(state, theirs[worker], 1e-5)


def test_between_two_rounds_it_changes_nothing() -> None:
    cluster = Cluster(resist(4, STEPS, min_depth=3, outer=OuterSGD()))
    cluster.train(2 * STEPS)
    before = cluster.states()
    found = check(cluster, cluster.regroup())
    assert (found.round, found.step, found.repeated) == (2, 2 * STEPS, False)
    after = cluster.states()
    for worker, state in before.items():
        close(after[worker], state)


def test_from_four_to_two_and_back_to_four() -> None:
    cluster = Cluster(resist(4, STEPS, capacities=(3, 2, 1, 2)))
    cluster.train(STEPS)
    capacities = [cluster.members[0].job.plan.capacities(worker) for worker in range(4)]
    for left in (3, 2):
        cluster.train(2 * STEPS, {1: 3})
        found = check(cluster, cluster.regroup())
        assert found.workers == left
        go_on(cluster)
    for workers in (3, 4):
        before = cluster.full()
        cluster.join()
        found = check(cluster, cluster.regroup())
        assert found.joined == (workers - 1,)
        close(cluster.full(), before)
        go_on(cluster)
    job = cluster.members[0].job
    assert sorted(job.plan.capacities(worker) for worker in range(4)) == sorted(capacities)
    assert job.generation == 4


def test_a_newcomer_has_the_average_the_momentum_and_the_counters() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=3, outer=OuterSGD(), optimizer_state="average"), averaged=True)
    cluster.train(2 * STEPS)
    cluster.members[1].job.model.get_buffer("0.seen").fill_(99)
    before, average = cluster.full(), merged(list(cluster.states(averaged=True).values()))
    cluster.join()
    found = check(cluster, cluster.regroup(order=[3, 0, 1, 2]))
    assert found.joined == (0,)
    close(cluster.full(), before)
    close(merged(list(cluster.states(averaged=True).values())), average)
    for member in cluster.members:
        worker, own = member.job.workers[0], cluster.members[0].job.workers[0]
        shared = [w.subnet.slot(None, 0, w.state[VELOCITY][torch.float32]) for w in (worker, own)]
        assert shared[0].abs().sum() > 0
        assert torch.equal(*shared)
        assert int(member.averages[0].n_averaged) == 2 * STEPS
        momentum = worker.state["momentum_buffer"][torch.float32]
        assert worker.subnet.slot(None, 0, momentum).abs().sum() > 0
        calls = [b for n, b in worker.model.named_buffers() if n.endswith("calls")]
        assert all(int(count) == 2 * STEPS for count in calls)
    seen = [int(member.job.model.get_buffer("0.seen")) for member in cluster.members]
    assert seen[1:] == [2 * STEPS, 99, 2 * STEPS]  # each keeps its own, and who joins has that of one of them
    assert seen[0] in seen[1:]
    go_on(cluster)


def test_lost_blocks_begin_with_empty_state() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0), optimizer=adam)
    cluster.train(2 * STEPS)
    job = cluster.members[0].job
    lost = set(job.plan.held(2)[0])
    cluster.train(STEPS, {2: 1})
    found = check(cluster, cluster.regroup())
    assert not found.repeated
    assert {block for _, block in found.recovered} == lost
    fresh: set[int] = set()
    for member in cluster.members:
        worker = member.job.workers[0]
        for parameter, place in worker.subnet.parameter_places():
            state: dict[str, Tensor] = member.optimizers[0].state.get(parameter, {})
            if place.chain is not None and (block := worker.subnet.held[0][place.slot]) in lost:
                assert not state
                fresh.add(block)
            else:
                assert int(state["step"]) > 2 * STEPS
    assert fresh == lost
    go_on(cluster)


def test_optimizers_start_over_where_a_round_is_repeated() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0), optimizer=adam)
    cluster.train(2 * STEPS)
    cluster.train(STEPS, {2: 4})
    assert check(cluster, cluster.regroup()).repeated
    assert not any(member.optimizers[0].state for member in cluster.members)
    go_on(cluster)


def test_two_losses_at_once_are_refused_by_all() -> None:
    for event in (1, 4):
        cluster = Cluster(resist(4, STEPS, min_depth=0))
        cluster.train(STEPS)
        cluster.train(STEPS, {1: event, 2: event})
        errors = cluster.regroup()
        assert len(errors) == 2
        assert len({str(error) for error in errors}) == 1
        assert all(type(error) is IncompleteNetworkError for error in errors)
        assert "was lost with workers 1, 2: " in str(errors[0])


def test_without_replicas_only_what_others_hold_is_left() -> None:
    cluster = Cluster(resist(4, STEPS, min_depth=6), replicate=False)
    cluster.train(STEPS + 1)
    cluster.train(STEPS, {1: 1})
    check(cluster, cluster.regroup())
    go_on(cluster)
    cluster = Cluster(resist(4, STEPS, capacities=(3, 1, 1, 1)), replicate=False)
    cluster.train(STEPS + 1)
    cluster.train(STEPS, {0: 1})
    errors = cluster.regroup()
    assert all(type(error) is IncompleteNetworkError for error in errors)
    assert "replicate=True" in str(errors[0])


def test_a_loss_in_the_first_round() -> None:
    for event in (1, 4):
        cluster = Cluster(resist(4, STEPS, min_depth=0))
        cluster.train(STEPS, {3: event})
        before = cluster.states()
        found = check(cluster, cluster.regroup())
        assert found.repeated == (event > 1)
        check_rule(cluster, found, before)
        go_on(cluster)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wire", ["int8", Wire("int8", "bf16", "int8", fragments=2, delay=1), Wire(fragments=2, delay=1)]
)
@pytest.mark.parametrize("outer", [None, OuterSGD()])
def test_wire_formats_and_fragments(wire: str | Wire, outer: OuterSGD | None) -> None:
    for event in range(1, 14, 1 if outer is None else 4):
        cluster = Cluster(resist(4, 4, min_depth=0, outer=outer), wire=wire)
        cluster.train(4)
        cluster.train(4, {1: event})
        check(cluster, cluster.regroup())
        for member in cluster.members:
            for fragment in member.job.workers[0].fragments:
                assert fragment.feedback.error is None or not fragment.feedback.error.any()
        assert set(cluster.train(6)) == {None}
        cluster.join()
        check(cluster, cluster.regroup())
        go_on(cluster, 4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["travel", pytest.param("average", marks=pytest.mark.nightly)])
def test_int4_in_fragments_and_a_loss_at_any_point(policy: str) -> None:
    """Of a round, while the others regroup, and while one joins."""
    steps = 4
    every = 1 if policy == "average" else 3
    for event in range(1, 22, every):
        cluster = Cluster(resist(4, steps, min_depth=0, optimizer_state=policy), wire=STREAMED, averaged=True)
        cluster.train(steps + 1)
        losses = cluster.train(2 * steps, {2: event})
        if len(cluster.members) == 4:  # there are not so many events in two rounds
            continue
        assert all(isinstance(loss, WorkerLostError) for loss in losses)
        found = check(cluster, cluster.regroup())
        check_point(cluster, found)
        go_on(cluster, 4)
        cluster.join()
        cluster.regroup({1: event})
        found = check(cluster, cluster.regroup())
        assert found.workers == len(cluster.members)
        check_point(cluster, found)
        go_on(cluster, 4)


def check_point(cluster: Cluster, found: Regrouped) -> None:
    """A repeated round begins with what it began with before; replicas are rounded as blocks are when they are sent."""
    if not found.repeated:
        return
    generation = max(g for g, round in cluster.history if round == found.round and g < found.generation)
    now, before = cluster.full(), merged(list(cluster.history[generation, found.round].values()))
    rounded = (
        tuple(f"2.{block}." for _, block in found.recovered) if cluster.options.get("wire", Wire()) != Wire() else ()
    )
    for name in [name for name in before if name.startswith(rounded)] if rounded else []:
        assert (now.pop(name) - (value := before.pop(name))).abs().max() <= 0.05 * value.abs().max(), name
    close(now, before)


@pytest.mark.parametrize(
    ("joins", "every", "wire"),
    [
        pytest.param(0, 3, Wire(), marks=pytest.mark.slow),
        pytest.param(1, 3, Wire(), marks=pytest.mark.slow),
        pytest.param(0, 1, Wire(), marks=pytest.mark.nightly),
        pytest.param(1, 1, Wire(), marks=pytest.mark.nightly),
        pytest.param(0, 1, STREAMED, marks=pytest.mark.nightly),
        pytest.param(1, 1, STREAMED, marks=pytest.mark.nightly),
    ],
)
def test_a_second_loss_while_members_regroup(joins: int, every: int, wire: Wire) -> None:
    """Whatever the second one does, there is a network or one error in all processes, and never a wrong network."""
    outcomes: set[type] = set()
    for number, first in enumerate((1, 4, 8)):
        for second in range(1 + number % every, 18, every):
            cluster = Cluster(resist(4, STEPS, min_depth=0, outer=OuterSGD() if joins else None), wire=wire)
            cluster.train(STEPS + 1)
            cluster.train(2 * STEPS, {1: first})
            cluster.join(joins)
            cluster.regroup({3 if joins else 1: second})  # who has joined is not missed
            if len(cluster.members) == 3 + joins:  # it came to the end before
                continue
            results = cluster.regroup()
            outcomes.add(type(results[0]))
            if isinstance(results[0], IncompleteNetworkError):
                assert all(type(error) is IncompleteNetworkError for error in results)
                continue
            found = check(cluster, results)
            check_point(cluster, found)
            go_on(cluster)
    assert outcomes == ({Regrouped} if joins else {Regrouped, IncompleteNetworkError})


def test_a_process_with_two_workers() -> None:
    for victim in (0, 1):
        cluster = Cluster(resist(4, STEPS, min_depth=5), hosted=[(0, 1), (2, 3)])
        cluster.train(STEPS + 1)
        cluster.train(STEPS, {victim: 3})
        found = check(cluster, cluster.regroup())
        assert found.lost == ((0, 1) if victim == 0 else (2, 3))
        go_on(cluster)


def test_a_process_gives_up_some_of_its_workers() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0), hosted=[(0, 1, 2)])
    cluster.train(STEPS + 1)
    before, (member,) = cluster.states(), cluster.members
    found = member.regroup(Threaded(Wires([(0, 1)]), 0), kept=[0, 2])
    member.optimizers = [member.optimizers[0], member.optimizers[2]]
    check(cluster, [found])
    assert found.former == {0: 0, 1: 2}
    del before[1]
    check_rule(cluster, found, before)
    go_on(cluster)


def test_bounds_of_the_workers() -> None:
    cluster = Cluster(resist(4, STEPS, min_depth=0))
    cluster.train(STEPS + 1)
    cluster.train(STEPS, {3: 1})
    errors = cluster.regroup(most=1)
    assert all(type(error) is AgreedError for error in errors)
    assert "3 workers may hold 3 of the 6 blocks of chain 2" in str(errors[0])
    check(cluster, cluster.regroup(most=2))
    assert all(member.job.workers[0].subnet.capacities == (2,) for member in cluster.members)
    go_on(cluster)


def test_torn_weights_are_not_used_by_accident() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0))
    cluster.train(STEPS)
    states = [member.job.state_dict() for member in cluster.members]
    cluster.train(STEPS, {2: 4})
    jobs = [member.job for member in cluster.members]
    assert all(job.torn for job in jobs)
    for call in (jobs[0].synchronize, jobs[0].finish, jobs[0].full_model):
        with pytest.raises(UserError, match="the last synchronization was not completed"):
            call()
    with pytest.raises(UserError, match="a job is saved between two rounds"):
        jobs[0].state_dict()
    other = Cluster(resist(3, STEPS, min_depth=0))
    other.members[0].job.torn = True
    makers = [lambda m=m, s=s: m.job.load_state_dict(s) for m, s in zip(other.members, states, strict=True)]
    in_threads(makers, other.wires)
    go_on(other)


def test_images_are_counted_as_by_going_on_with_other_workers() -> None:
    cluster = Cluster(resist(4, STEPS, min_depth=0))
    cluster.train(3 * STEPS + 1)
    cluster.train(STEPS, {3: 1})  # each has made both steps of the fourth round
    assert check(cluster, cluster.regroup()).step == (4 * 3 * STEPS + 3 * STEPS) // 3
    cluster = Cluster(resist(4, STEPS, min_depth=0))
    cluster.train(4 * STEPS, {3: 3 * (ROUND_EVENTS - 1) + 4})
    found = check(cluster, cluster.regroup())
    assert found.repeated
    assert found.step == 4 * 3 * STEPS // 3


def test_what_is_refused_changes_nothing() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0))
    cluster.train(STEPS)
    before = cluster.states()
    cluster.options["seed"] = 5
    cluster.join()
    errors = cluster.regroup()
    assert "process 3 was started with `seed=5`, process 0 with `seed=0`" in str(errors[0])
    cluster.members.pop()
    cluster.options["seed"] = 0
    for worker, state in cluster.states().items():
        close(state, before[worker], 0)
    assert "kept has worker 7, and this process hosts [0]" in str(cluster.regroup(kept=[7])[0])
    cluster.join()
    cluster.members[-1].job._optimizers = ()
    cluster.members[-1].job.attach(adam(cluster.members[-1].job.model))
    assert "process 3 trains a worker with Adam, process 0 with SGD" in str(cluster.regroup()[0])
    cluster.members.pop()
    for worker, state in cluster.states().items():
        close(state, before[worker], 0)
    cluster.join()
    with pytest.raises(UserError, match=r"call job\.regroup with the others before training"):
        cluster.members.pop().train(STEPS)
    check(cluster, cluster.regroup())
    go_on(cluster)


def test_ddp_cannot_regroup() -> None:
    with pytest.raises(UserError, match="ddp joins the workers in every step, and cannot go on with others"):
        Job(network, ddp(2, STEPS), elastic=True)


def test_what_is_not_elastic_keeps_nothing_and_cannot_regroup() -> None:
    job = Job(network, resist(2, STEPS, min_depth=0), replicate=True, example=False)
    assert not job.starts
    with pytest.raises(UserError, match="`elastic=True`"):
        job.regroup(Local(2))


@pytest.mark.slow
def test_a_switch_and_diloco() -> None:
    for strategy in (
        switch(local_sgd(3, STEPS), resist(3, STEPS, min_depth=0), at_round=2),
        diloco(3, STEPS),
    ):
        for event in (1, 3, 4):
            cluster = Cluster(strategy)
            cluster.train(STEPS + 1)
            cluster.train(STEPS, {1: event})
            check(cluster, cluster.regroup())
            go_on(cluster)
            cluster.join()
            check(cluster, cluster.regroup())
            go_on(cluster)


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 3)
@given(st.data())
def test_any_sequence_of_losses_and_arrivals_leaves_a_complete_network(data: st.DataObject) -> None:
    workers = data.draw(st.integers(2, 4))
    capacities = data.draw(
        st.lists(st.integers(1, 6), min_size=workers, max_size=workers).filter(lambda c: sum(c) >= 6)
    )
    policy = data.draw(st.sampled_from(["travel", "average", "reset", "keep"]))
    outer = data.draw(st.sampled_from([None, OuterSGD()]))
    optimizer = data.draw(st.sampled_from([sgd, adam]))
    wire = data.draw(st.sampled_from([Wire(), Wire("int8", "bf16", "int8"), Wire("int8", fragments=1, delay=1)]))
    strategy = resist(workers, STEPS, capacities=capacities, optimizer_state=policy, outer=outer)
    cluster = Cluster(strategy, optimizer=optimizer, averaged=data.draw(st.booleans()), wire=wire)
    for _ in range(data.draw(st.integers(1, 3))):
        steps = data.draw(st.integers(0, 2 * STEPS))
        if len(cluster.members) > 1 and data.draw(st.booleans()):
            victim = data.draw(st.integers(0, len(cluster.members) - 1))
            cluster.train(steps + STEPS, {victim: data.draw(st.integers(1, 2 * ROUND_EVENTS))})
        else:
            cluster.train(steps)
            if len(cluster.members) < 4:
                cluster.join()
        order = data.draw(st.permutations(range(len(cluster.members))))
        before = {w.index: m.state(w) for m in cluster.members for w in m.job.workers if m.job.generation >= 0}
        found = check(cluster, cluster.regroup(order=order))
        if (outer is None and not wire.fragments) or found.repeated:
            check_rule(cluster, found, before)
        go_on(cluster)


def test_the_state_of_blocks_that_stay_goes_with_them() -> None:
    """Down to the last worker, whose slots are filled with recovered blocks."""
    cluster = Cluster(resist(3, STEPS, min_depth=0), optimizer=adam)
    cluster.train(2 * STEPS)
    while len(cluster.members) > 1:
        cluster.train(STEPS, {len(cluster.members) - 1: 1})
        before = momenta(cluster)
        found = check(cluster, cluster.regroup())
        after, lost = momenta(cluster), {f"2.{block}." for _, block in found.recovered}
        assert {name for name in before if not name.startswith("2.")} <= after.keys()
        for name, value in after.items():
            assert not name.startswith(tuple(lost))
            if name.startswith("2."):
                torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-9)
        assert len(after) < sum(1 for _ in NETWORK.parameters()) == len(before) + len(lost) * 4
        go_on(cluster)


def momenta(cluster: Cluster) -> State:
    """Adam's first moments by global name. Those of the shared part are of one of the workers."""
    found: State = {}
    for member in cluster.members:
        worker = member.job.workers[0]
        for parameter, place in worker.subnet.parameter_places():
            if state := member.optimizers[0].state.get(parameter):
                found[worker.subnet.layout.full_name(place, worker.subnet.held)] = state["exp_avg"].clone()
    return found


def test_a_worker_with_nan_is_left_out_where_that_is_wanted() -> None:
    for on_nonfinite in ("drop", "stop"):
        cluster = Cluster(resist(4, STEPS, min_depth=0), on_nonfinite=on_nonfinite)
        cluster.train(2 * STEPS)
        began = cluster.full()
        cluster.train(STEPS, {3: 1})
        worker = cluster.members[1].job.workers[0]
        with torch.no_grad():
            worker.model.get_parameter("0.weight").fill_(torch.nan)
        states = cluster.states()
        own = {name for name in states[1].keys() - states[0].keys() - states[2].keys() if name.startswith("2.")}
        assert own
        results = cluster.regroup()
        if on_nonfinite == "stop":
            assert {type(error) for error in results} == {DivergedError}
            continue
        check(cluster, results)
        assert all(set(member.job.dropped) == {1} for member in cluster.members)
        full = cluster.full()
        close({name: full[name] for name in own}, {name: began[name] for name in own})
        go_on(cluster)


def test_everything_that_is_sent_is_booked() -> None:
    cluster = Cluster(resist(3, STEPS, min_depth=0, optimizer_state="average"))
    cluster.train(2 * STEPS)
    for member in cluster.members:
        member.job.transport.take()
    cluster.join()
    check(cluster, cluster.regroup())
    job = cluster.members[0].job
    accounts: dict[str, Any] = job.transport.take()
    shared = job.workers[0].subnet.shared.nbytes
    assert accounts["bytes"]["shared"] == 4 * (2 * 3 * shared // 4)
    joined = sum(job.workers[0].subnet.block_bytes[0] for _ in job.plan.held(3)[0])
    assert sum(n for _, target, n in accounts["pairs"] if target == 3) >= joined
    assert accounts["bytes"]["state"] > 0
    assert accounts["bytes"]["control"] > 0


def test_a_regrouped_job_is_saved_as_any_other() -> None:
    cluster = Cluster(resist(4, STEPS, min_depth=3))
    cluster.train(STEPS + 1)
    cluster.train(STEPS, {2: 1})
    check(cluster, cluster.regroup())
    cluster.train(STEPS)
    states = [member.job.state_dict() for member in cluster.members]
    other = Cluster(resist(3, STEPS, min_depth=3))
    in_threads(
        [lambda m=m, s=s: m.job.load_state_dict(s) for m, s in zip(other.members, states, strict=True)], other.wires
    )
    for one, two in zip(cluster.members, other.members, strict=True):
        assert (one.job.round, one.job.step_index) == (two.job.round, two.job.step_index)
    for worker, state in cluster.states().items():
        close(state, other.states()[worker], 0)
