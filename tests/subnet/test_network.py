"""Sub-networks: shallow networks of views into one flat tensor, which lose nothing and keep their parameters."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.job import Job
from resist.models import PreActResNet, build
from resist.models.preact_cifar import PreActBlock
from resist.planning.plan import Plan, partition
from resist.planning.strategy import OuterSGD, Strategy, local_sgd, resist
from resist.subnet.batchnorm import use_batch_statistics
from resist.subnet.network import Subnet
from resist.subnet.scaling import scale_branches
from resist.subnet.skeleton import skeleton
from resist.subnet.tensors import tensors_of
from support import BLOCKS, by_name, floats, make, sgd, tiny, train


class Zoo(nn.Module):
    """Containers of several forms: named children, two chains in one container, a list, a chain behind a chain."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"s": (3, 2), "a": (2, 2), "b": (2, 2), "c": (2, 2), "t": (2, 4), **dict.fromkeys("def", (4, 4))}
        self.one = nn.Sequential(OrderedDict((key, PreActBlock(a, b, 1)) for key, (a, b) in widths.items()))
        self.many = nn.ModuleList([PreActBlock(4, 3, 2), *(PreActBlock(3, 3, 1) for _ in range(4)), nn.Conv2d(3, 3, 1)])
        self.register_buffer("offset", torch.randn(3))
        self.register_buffer("count", torch.tensor(3))
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.one(images)
        for module in self.many:
            x = module(x)
        return self.head(x.mean(dim=(2, 3)) + self.offset)


ZOO_CHAINS = {"one:1-3": 3, "one:5-7": 3, "many:1-4": 4}


def zoo() -> nn.Module:
    """All weights and statistics different from their defaults."""
    model = Zoo()
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.uniform_(0.1, 1)
    return model


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[str, ...], Strategy]:
    """Some of the zoo's chains, and capacities of each that change from round to round."""
    names = draw(st.lists(st.sampled_from(sorted(ZOO_CHAINS)), min_size=1, unique=True))
    workers = draw(st.integers(1, 4))

    def assign(num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        drawn = rounds[round % len(rounds)][chain]
        capacities = (max(drawn[0], num_blocks - sum(drawn[1:])), *drawn[1:])
        return partition(num_blocks, capacities, seed=seed, round=round, chain=chain)

    rounds = [
        {name: [draw(st.integers(1, ZOO_CHAINS[name])) for _ in range(workers)] for name in names}
        for _ in range(draw(st.integers(1, 3)))
    ]
    return tuple(names), Strategy("any", workers, 1, assign)


@pytest.mark.slow
@given(partitions(), st.booleans(), st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=settings().max_examples // 6)
def test_splitting_and_averaging_restores_all_weights(
    case: tuple[tuple[str, ...], Strategy], channels_last: bool, seed: int, rounds: int
) -> None:
    """Bit for bit, through any number of rounds without training."""
    names, strategy = case
    job = Job(zoo, strategy, chains=names, seed=seed, channels_last=channels_last, batchnorm="average", scale=1.0)
    original = job_full(seed)
    for _ in range(rounds):
        job.synchronize()
    for worker in job.workers:
        own = worker.model.state_dict()
        assert set(by_name(job, worker, lambda p: p)) <= set(original)
        assert torch.equal(own["offset"], original["offset"])
    full = job.full_model()
    assert full is not None
    assert list(full.state_dict()) == list(zoo().state_dict())
    for name, value in floats(full).items():
        assert torch.equal(value, original[name]), name


def job_full(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return floats(zoo())


@pytest.mark.slow
@given(partitions(), st.booleans())
@settings(max_examples=settings().max_examples // 10)
def test_a_subnetwork_computes_what_the_full_network_does_without_the_others(
    case: tuple[tuple[str, ...], Strategy], channels_last: bool
) -> None:
    """Compare with the full network in which the blocks that a worker does not hold are replaced by nn.Identity."""
    names, strategy = case
    job = Job(zoo, strategy, chains=names, seed=1, channels_last=channels_last, batchnorm="average")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for worker in job.workers:
        full = zoo()
        full.load_state_dict(job_full(1), strict=False)
        for chain, held in zip(job.chains, job.plan.held(worker.index), strict=True):
            for block in set(range(chain.num_blocks)) - set(held):
                full.get_submodule(chain.container)._modules[chain.keys[chain.first + block]] = nn.Identity()
        torch.testing.assert_close(worker.model.eval()(images), full.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters_keep_their_identity_and_their_place(channels_last: bool) -> None:
    job, optimizers = make(resist(2, 2), channels_last=channels_last)
    before = [[(id(p), p.data_ptr()) for p in worker.model.parameters()] for worker in job.workers]
    flats = [worker.subnet.flat.data_ptr() for worker in job.workers]
    train(job, optimizers, 7)
    assert [[(id(p), p.data_ptr()) for p in worker.model.parameters()] for worker in job.workers] == before
    assert [worker.subnet.flat.data_ptr() for worker in job.workers] == flats


@pytest.mark.parametrize("channels_last", [False, True])
def test_all_weights_and_statistics_are_views_that_tile_the_flat_tensor(channels_last: bool) -> None:
    model = zoo()
    subnet = Subnet(model, choose_chains(model, tuple(ZOO_CHAINS)), (2, 3, 1), channels_last=channels_last)
    tensors = tensors_of(subnet.model)
    taken = torch.zeros_like(subnet.flat)
    for tensor in tensors.values():
        start = (tensor.data_ptr() - subnet.flat.data_ptr()) // 4
        taken[start : start + tensor.numel()] += 1
    assert set(taken.tolist()) <= {0, 1}  # what no tensor takes is padding, and zero
    assert not subnet.flat[taken == 0].any()
    padding = [n * block.padding for block, n in zip(subnet.layout.blocks, (2, 3, 1), strict=True)]
    assert int((taken == 0).sum()) == sum(padding) == subnet.layout.padding > 0
    assert int(taken.sum()) == subnet.numel((2, 3, 1)) == sum(t.numel() for t in tensors.values())
    for name, tensor in tensors.items():
        if tensor.dim() == 4 and channels_last:
            assert tensor.is_contiguous(memory_format=torch.channels_last), name
        else:
            assert tensor.is_contiguous(), name


class Gated(nn.Module):
    """A block with an odd number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.conv(x)


def gated() -> nn.Module:
    blocks = nn.Sequential(*(Gated() for _ in range(5)))
    return nn.Sequential(nn.Conv2d(3, 16, 3), blocks, nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize("num_classes", [10, 21, 100])
@pytest.mark.parametrize("frozen", ["", "layer2", "layer3"])
def test_large_weights_are_aligned_to_64_bytes(num_classes: int, frozen: str) -> None:
    """For any number of classes, in slots of blocks of any size, and if they are frozen."""
    with torch.device("meta"):
        model = PreActResNet((1, 2, 4, 1), num_classes, width=16)
        odd = PreActResNet((1, 1, 4, 1), num_classes, width=16)
    for module in odd.layer3:
        module.gate = nn.Parameter(torch.zeros(1, device="meta"))
    for template in (model, odd):
        for name, parameter in template.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        subnet = Subnet(template, choose_chains(template), (3,), device="meta")
        large = [p for p in subnet.model.parameters() if p.numel() % 16 == 0]
        assert len(large) > 30
        assert [p.storage_offset() * p.itemsize % 64 for p in large] == [0] * len(large)


@pytest.mark.parametrize(
    "strategy",
    [
        resist(3, 1, optimizer_state="travel"),
        resist(2, 1, outer=OuterSGD()),
        local_sgd(2, 1, optimizer_state="average"),
    ],
    ids=lambda strategy: f"{strategy.name} {strategy.optimizer_state} {strategy.outer is not None}",
)
def test_padding_is_zero_whatever_happens(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2321 elements with 15 of padding; memory that is not initialized has NaN in it."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: plain(*size, **options).fill_(torch.nan))
    job = Job(gated, strategy, batchnorm="average", example=torch.randn(2, 3, 6, 6))
    (block,) = job.workers[0].subnet.layout.blocks
    assert (block.numel, block.padding) == (2336, 15)
    optimizers = [sgd(worker.model) for worker in job.workers]
    for _ in range(3):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            worker.model(torch.randn(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
        assert job.step(*optimizers)
    job.full_model()
    for worker in job.workers:
        layout = worker.subnet.layout
        for flats in (worker.subnet.flats, *worker.state.values()):
            (flat,) = flats.values()
            assert flat.any()
            for slot in range(layout.capacities[0]):
                assert not layout.slot(0, slot, flat)[-15:].any()


def test_the_full_network_is_never_allocated() -> None:
    """A template on the meta device and a sub-network of a tenth of it: nothing larger is allocated."""
    with torch.device("meta"):
        template = build("preact_resnet101", num_classes=10)
    largest = 0
    plain = torch.empty

    def watched(*size: object, **options: object) -> Tensor:
        nonlocal largest
        made = plain(*size, **options)  # type: ignore[call-overload]
        largest = max(largest, 0 if made.is_meta else made.numel())
        return made

    chains = choose_chains(template)
    torch.empty = watched  # type: ignore[assignment]
    try:
        subnet = Subnet(template, chains, (2,))
    finally:
        torch.empty = plain  # type: ignore[assignment]
    full, own = (sum(t.numel() for t in tensors_of(m).values()) for m in (template, subnet.model))
    assert largest == own == subnet.flat.numel() == full - 20 * subnet.layout.blocks[0].numel
    assert len(list(subnet.model.get_submodule("layer3").children())) == 3


def test_skeleton_has_no_weights_and_no_gradients() -> None:
    model = tiny()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    bones = skeleton(model)
    assert all(tensor.is_meta for tensor in tensors_of(bones).values())
    assert all(parameter.grad is None for parameter in bones.parameters())
    assert all(not tensor.is_meta for tensor in tensors_of(model).values())


def test_names_are_those_of_the_full_network() -> None:
    job, _ = make(resist(3, capacities=(1, 2, 5)))
    full = floats(tiny())
    seen: set[str] = set()
    for worker in job.workers:
        held = job.plan.held(worker.index)
        state = worker.subnet.state(held)
        assert set(state) <= set(full)
        assert {name.split(".")[1] for name in state if name.startswith("layer3.")} == {
            "0",
            *(str(1 + block) for block in held[0]),
        }
        seen |= set(state)
    assert seen == set(full)


def test_tied_weights_of_the_shared_part_stay_tied() -> None:
    class Tied(PreActResNet):
        def __init__(self) -> None:
            super().__init__((1, 1, 4, 1), 8, width=1)
            self.extra = nn.Linear(8, 8)
            self.extra.weight = self.head.weight

    job = Job(Tied, resist(2, 1), batchnorm="average")
    for worker in job.workers:
        assert worker.model.get_parameter("extra.weight") is worker.model.get_parameter("head.weight")
    job.synchronize()
    full = job.full_model()
    assert isinstance(full, Tied)
    assert full.extra.weight is full.head.weight


def test_a_container_may_have_parameters_of_its_own() -> None:
    class Scaled(nn.Sequential):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__(*blocks)
            self.scale = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.scale

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(*(PreActBlock(4, 4, 1) for _ in range(3)), nn.Conv2d(4, 2, 1)))
    subnet = Subnet(model, choose_chains(model), (1,))
    subnet.load(tensors_of(model), [(1,)])
    state = subnet.state([(1,)])
    assert set(state) == {name for name in tensors_of(model) if not name.startswith(("1.0.", "1.2."))}
    assert all(torch.equal(value, tensors_of(model)[name]) for name, value in state.items())


@pytest.mark.parametrize("keys", ["abcdef", "123456"])
def test_a_module_list_may_have_any_keys(keys: str) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList()
            for key, block in zip(
                keys, (nn.Conv2d(3, 4, 1), *(PreActBlock(4, 4, 1) for _ in range(4)), nn.Conv2d(4, 2, 1)), strict=True
            ):
                self.blocks.add_module(key, block)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks.children():
                x = block(x)
            return x

    model = Listed()
    tensors = tensors_of(model)
    subnet = Subnet(model, choose_chains(model), (2,))
    subnet.load(tensors, [(1, 3)])
    state = subnet.state([(1, 3)])
    left_out = (f"blocks.{keys[1]}.", f"blocks.{keys[3]}.")
    assert set(state) == {name for name in tensors if not name.startswith(left_out)}
    assert all(torch.equal(value, tensors[name]) for name, value in state.items())
    full = Subnet(subnet.model, subnet.chains, (4,), template_capacities=(2,))
    full.load(tensors, [range(4)])
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(full.model.eval()(images), model.eval()(images))


def test_growing_and_shrinking_keeps_the_remaining_parameters() -> None:
    model = tiny()
    chains = choose_chains(model)
    subnet = Subnet(model, chains, (2,))
    subnet.load(tensors_of(model), [(1, 4)])
    before = dict(subnet.model.named_parameters())
    grown = subnet.empty((4,))
    grown[torch.float64][: subnet.flat.numel()].copy_(subnet.flat)
    subnet.resize((4,), grown)
    after = dict(subnet.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(list(subnet.model.get_submodule("layer3").children())) == 5
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in after.values())
    assert torch.equal(after["layer3.2.conv1.weight"], tensors_of(model)["layer3.5.conv1.weight"])
    subnet.resize((1,), subnet.empty((1,)))
    assert all(p is before[name] for name, p in subnet.model.named_parameters())


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_scaled_branches(scale: float) -> None:
    """x + scale * f(x) by hand, block by block."""
    model = tiny().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        x = model.layer2(model.layer1(model.stem(images)))
        x = model.layer3[0](x)
        for block in model.layer3[1:]:
            x = x + scale * (block(x) - x)
        expected = model.head(model.layer4(x).mean(dim=(2, 3)))
        scale_branches(model, choose_chains(model), [scale])
        torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_batch_statistics_are_used_at_test_time() -> None:
    model = tiny()
    use_batch_statistics(model)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(images), model.train()(images), rtol=0, atol=0)
    assert not [name for name in model.state_dict() if "running" in name or "tracked" in name]


def test_moved_parameters_are_reported() -> None:
    job, _ = make(resist(2, 1))
    job.workers[1].model.to(memory_format=torch.channels_last)
    with pytest.raises(UserError, match=r"parameter '.*' was moved out of the sub-network's flat tensor"):
        job.synchronize()
    job, _ = make(resist(2, 1))
    job.workers[0].model.float()
    with pytest.raises(UserError, match="give Job the device, and use autocast for lower precision"):
        job.synchronize()


def test_memory_follows_the_subnetwork() -> None:
    job, _ = make(resist(3, min_depth=0), sgd)
    (layout,), full = job.workers[0].subnet.layout.blocks, sum(t.numel() for t in tensors_of(tiny()).values())
    assert all(worker.subnet.flat.numel() == full - (BLOCKS - 2) * layout.numel for worker in job.workers)


@pytest.mark.slow
def test_workers_are_made_without_copies_of_the_full_network() -> None:
    """Sixteen workers with 2 of 32 blocks each: the work follows the sub-networks."""
    copied = 0

    class Counted(PreActBlock):
        def __reduce_ex__(self, protocol: object) -> object:
            nonlocal copied
            copied += 1
            return super().__reduce_ex__(protocol)  # type: ignore[arg-type]

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 2, 1), *(Counted(2, 2, 1) for _ in range(32)), nn.Conv2d(2, 2, 1))

    job = Job(build, resist(16, 1, min_depth=0), batchnorm="average")
    assert [worker.subnet.capacities for worker in job.workers] == [(2,)] * 16
    assert copied <= 2 * 32
