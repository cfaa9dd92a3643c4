"""Whatever the blocks of a chain differ in goes with its block, and what the user sets stays; see `odd_blocks`."""

import functools
import itertools
import logging
import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odd_blocks import BLOCKS, FORMS, KINDS, WIDTH, Block, Formed, Net, build, value
from pool import Pool
from resist.blocks.compiling import allow_graphs, num_combinations
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import Strategy, local_sgd, resist, switch

pytestmark = pytest.mark.slow

STRATEGIES = {
    "all": local_sgd(1, 1),
    "two": resist(2, 1, min_depth=0),
    "growing": switch(resist(2, 1, capacities=(2, 4)), local_sgd(2, 1), at_round=2),
}
NAMES = [*KINDS, *(f"{form}.{name}" for form in FORMS for name in ("_private",)), "float.public", "config.public"]


def job_of(name: str, strategy: Strategy) -> Job:
    return Job(lambda: build(name), strategy, scale=1.0, chains="blocks:0-5", batchnorm="average")


def plain(name: str) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return build(name).eval()  # type: ignore[return-value]


def errors(name: str, strategy: str, rounds: int = 3) -> list[float]:
    """Differences of sub-networks to the network without the other blocks, and of the full network to the network."""
    job, net, x = job_of(name, STRATEGIES[strategy]), plain(name), torch.randn(4, WIDTH)
    found: list[float] = []
    with torch.no_grad():
        for _ in range(rounds):
            for worker in job.workers:
                held = list(job.plan.held(worker.index)[0])
                found.append(float((worker.model.eval()(x) - net(x, held)).abs().max()))
            job.synchronize()
        expected = net(x)
        if (full := job.full_model()) is not None:
            found.append(float((full(x) - expected).abs().max()))
            for worker in job.workers:  # it uses nothing of the sub-networks
                for flat in worker.subnet.flats.values():
                    flat.fill_(7.0)
            found.append(float((full(x) - expected).abs().max()))
    job.close()
    return found


# torch multiplies with matrices that have another alignment.
INEXACT = {"SpectralNorm": 1e-6}


@pytest.mark.parametrize(
    "strategies", [["growing"], pytest.param(["all", "two"], id="others", marks=pytest.mark.nightly)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_they_go_with_their_block(name: str, strategies: list[str]) -> None:
    """All weights stay as they are, so each sub-network is the network without the blocks that it does not hold."""
    for strategy in strategies:
        assert max(errors(name, strategy)) <= INEXACT.get(name, 0.0)


@pytest.mark.parametrize("name", ["lambda._private", "ReferencesAndValue", "SpectralNorm", "Buffers", "Drawn"])
def test_between_processes(pool: Pool, name: str) -> None:
    for found in pool.run(2, errors, name, "growing"):
        assert max(found) <= INEXACT.get(name, 0.0)


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm", "Orthogonal", "Parametrized", "Pruned", "Activations"])
def test_they_train(name: str) -> None:
    """One worker with all blocks trains as the network does, and the full network has its weights and names."""
    job, net = job_of(name, local_sgd(1, 2)), plain(name).train()
    models: list[nn.Module] = [job.model.train(), net]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    for step in range(5):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        job.step(optimizers[0])
    full = job.full_model()
    assert full is not None
    ours, expected = full.state_dict(), net.state_dict()
    assert list(ours) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor)
    torch.testing.assert_close(full(x), net.eval()(x))


def test_a_parametrization_is_removed_from_one_copy_only() -> None:
    job, x = job_of("WeightNorm", STRATEGIES["two"]), torch.randn(2, WIDTH)
    full = job.full_model()
    assert full is not None
    expected = full(x)
    torch.nn.utils.parametrize.remove_parametrizations(full.blocks[0].fc, "weight")  # type: ignore[union-attr,index]
    torch.testing.assert_close(full(x), expected)
    for worker in job.workers:
        worker.model(x)


class Dropping(Block):
    """A block whose drop rate, private or not, varies along the chain or not."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.p, self._p, self.q, self.count = value(number), value(number), 0.5, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.branch(x)


@pytest.mark.parametrize("name", ["p", "_p", "q"])
def test_what_the_user_sets_stays_and_is_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Even where the value is the one that a block had anyway: 0.5 is that of block 4."""
    job = Job(lambda: Net(Dropping), resist(2, 1, min_depth=0), scale=1.0, chains="blocks")
    x = torch.randn(2, WIDTH)
    with caplog.at_level(logging.WARNING):
        for worker in job.workers:
            worker.model(x)
        job.synchronize()
        assert not caplog.messages
        for worker in job.workers:
            for block in worker.model.blocks:  # type: ignore[union-attr]
                setattr(block, name, 0.5 if name == "p" else 0.25)
        for _ in range(4):
            job.synchronize()
            for worker in job.workers:
                worker.model(x)
                blocks = list(worker.model.blocks)  # type: ignore[arg-type]
                held = job.plan.held(worker.index)[0]
                assert {getattr(block, name) for block in blocks} == {0.5 if name == "p" else 0.25}
                other = "_p" if name == "p" else "p"
                assert [getattr(block, other) for block in blocks] == [value(number) for number in held]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{name} of the blocks of blocks:0-5 was changed during training")
    full = job.full_model()
    assert full is not None
    if name != "q":
        assert [getattr(block, name) for block in full.blocks] == [value(number) for number in range(BLOCKS)]  # type: ignore[union-attr]


def test_a_value_that_the_module_changes_itself_is_not_called_the_users(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Block):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.seen = number

        def forward(self, x: Tensor) -> Tensor:
            self.note()
            return x + self.branch(x)

        def note(self) -> None:
            self.seen += 1

    job = Job(lambda: Net(Counting), resist(2, 1, min_depth=0), scale=1.0, chains="blocks")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for worker in job.workers:
                worker.model(torch.randn(2, WIDTH))
            job.synchronize()
    assert not caplog.messages


class Hidden(Block):
    def __init__(self, what: str, number: int) -> None:
        super().__init__()
        if what == "layer":
            self.hidden = [nn.Linear(2, 2)]
        elif what == "parameter":
            self.hidden = {"w": nn.Parameter(torch.full((8,), value(number)))}  # type: ignore[assignment]
        elif what == "generator":
            self.hidden = (n for n in range(number))  # type: ignore[assignment]
        elif what == "view":
            self.hidden = self.fc.weight.data[:2]  # type: ignore[assignment]
        elif what == "weight_norm":
            with pytest.warns(FutureWarning):
                torch.nn.utils.weight_norm(self.fc)
        elif what == "spectral_norm":
            torch.nn.utils.spectral_norm(self.fc)
        elif what == "meta":
            self.fc = nn.Linear(WIDTH, WIDTH, device="meta")
        elif what == "lazy":
            self.fc = nn.LazyLinear(WIDTH)


class WithState(Block):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None: ...


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layer", "blocks 0 and 1 of blocks differ in hidden, which refers to a Linear that is not registered in the"),
        ("parameter", "differ in hidden, which holds a parameter that is not registered in the network"),
        ("generator", r"differ in hidden, which cannot be copied \(TypeError\)"),
        ("view", "attribute hidden of blocks.0 is a view of a weight.*take the view in forward"),
        ("weight_norm", "blocks.0.fc has the old form of weight_norm.*use torch.nn.utils.parametrizations.weight_norm"),
        ("spectral_norm", "old form of spectral_norm, a hook; use torch.nn.utils.parametrizations.spectral_norm"),
        ("meta", "'blocks.0.fc.weight' is on the meta device, without values; let build_model build"),
        ("lazy", "parameter 'blocks.0.fc.weight' has no shape yet"),
    ],
)
def test_what_cannot_go_with_a_block_is_refused_by_name(what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Job(lambda: Net(functools.partial(Hidden, what)), resist(2, 1, min_depth=0), chains="blocks:0-5")


@pytest.mark.parametrize("what", ["list", "closure", "hook", "weight"])
def test_references_to_blocks_are_refused_by_name(what: str) -> None:
    """A list of the blocks beside their container would not change with them."""

    def refer(net: Net) -> None:
        blocks = list(net.blocks)
        if what == "list":
            net.aliases = blocks
        elif what == "closure":
            net.run = lambda x: blocks[0](x)
        elif what == "hook":
            net.head.register_forward_hook(lambda module, args, output: output + 0.0 * blocks[0].fc.weight.mean())
        else:
            net.head.weights = {"first": blocks[0].fc.weight}

    with pytest.raises(UserError, match=r"of (the network|head) refers to blocks\.\d, which a sub-network"):
        Job(lambda: Net(lambda number: Block(), refer), resist(2, 1, min_depth=0))


def test_state_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"blocks\.0 has state of its own \(get_extra_state\).*keep it in buffers"):
        Job(lambda: Net(lambda number: WithState()), resist(2, 1, min_depth=0))


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
@pytest.mark.parametrize("inner", [False, True])
def test_wrappers_are_taken_off(wrapper: type, inner: bool, caplog: pytest.LogCaptureFixture) -> None:
    def wrapped() -> nn.Module:
        net = build("float.public")
        if not inner:
            return wrapper(net)
        for name, block in list(net.blocks.named_children()):
            net.blocks._modules[name] = wrapper(block)
        return net

    with caplog.at_level(logging.WARNING):
        job = Job(wrapped, resist(2, 1, min_depth=0), scale=1.0)
    assert len(caplog.messages) == 1
    assert "Job trains the network in it" in caplog.messages[0]
    full, x = job.full_model(), torch.randn(2, WIDTH)
    assert type(full) is Net
    assert [type(block) for block in full.blocks] == [Formed] * BLOCKS
    assert torch.equal(full(x), plain("float.public")(x))


def test_a_scripted_network_is_refused() -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match=r"a network of torch\.jit, whose blocks cannot be left out"):
        Job(lambda: torch.jit.trace(Small(), torch.zeros(1)), resist(2, 1))


TAGS = "use_recursive_dict_tags_for_guards"  # of guards, in some versions of torch


class Flagged(Block):
    """A block of which every second one does something else, as the windows of Swin are shifted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.shifted = number % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x.roll(1, -1) if self.shifted else x)


@torch._dynamo.config.patch({TAGS: False} if hasattr(torch._dynamo.config, TAGS) else {})  # refused on Python 3.13.0
def test_a_compiled_network_whose_flags_alternate_stays_compiled(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    job = Job(lambda: Net(Flagged), resist(2, 1, min_depth=0), scale=1.0, chains="blocks")
    worker, x = job.workers[0], torch.randn(2, WIDTH)
    model = torch.compile(worker.model, backend=backend)
    seen: set[tuple[bool, ...]] = set()
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.config.recompile_limit = 2
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(12):
                seen.add(tuple(block.shifted for block in worker.model.blocks))  # type: ignore[union-attr]
                torch.testing.assert_close(model(x), worker.model(x))
                assert len(graphs) == len(seen)
                job.synchronize()
    finally:
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = before
        torch._dynamo.reset()
    assert len(seen) > 4
    (message,) = (message for message in caplog.messages if "torch.compile" in message)
    assert "torch.compile makes a graph for each combination that it meets in the slots, up to 8" in message


@pytest.mark.skipif(not hasattr(torch._dynamo.config, TAGS), reason="another version of torch")
def test_a_compiled_network_that_does_not_notice_flags_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    monkeypatch.setitem(torch._dynamo.utils.counters["stats"], "unique_graphs", 1)
    with torch._dynamo.config.patch({TAGS: False}):
        allow_graphs(2, "blocks", set())
    assert not caplog.messages
    noted: set[str] = set()
    with torch._dynamo.config.patch({TAGS: True}):
        for _ in range(2):
            allow_graphs(2, "blocks", noted)
    (message,) = caplog.messages
    assert "along blocks: torch.compile does not notice on Python 3.13.0 that flags of a module change" in message


def test_combinations_of_values_in_slots() -> None:
    for values, capacity in (("0101", 2), ("0123", 2), ("0000", 3), ("00110101", 4), ("01", 0)):
        assert num_combinations(values, capacity) == len(set(itertools.combinations(values, capacity)))
