"""Folded networks compute the same as the scaled full network, without hooks."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from exported import hooks, noise
from resist.errors import UserError
from resist.export import difference, fold, fold_scale
from resist.planning.strategy import resist
from resist.subnet.scaling import ScaleBranch, scale_blocks, scales_of
from support import BLOCKS, batch, full_of, make, tiny, train

CHANNELS = 6


class Before(nn.Module):
    """Pre-activation, with a bias and a dropout behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(F.relu(self.norm(x), inplace=True)))


class LayerScale(nn.Module):
    """ConvNeXt's: a factor for each channel, a parameter of the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((CHANNELS, 1, 1), 1e-6))
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class Standardized(nn.Conv2d):
    """Weight-standardized: scaling the weight changes nothing, `gain` and bias have to be scaled."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS, 1)
        self.gain = nn.Parameter(torch.ones(CHANNELS, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, self.gain * (self.weight - mean) / std, self.bias)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardized()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.sigmoid(x))


class Linear(nn.Module):
    """The output is a tuple, as Hugging Face's blocks give it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(CHANNELS, 3), nn.Linear(3, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(x.movedim(1, -1)))).movedim(-1, 1)


class After(nn.Module):
    """Post-activation, as torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Two(nn.Module):
    """Two residual branches, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(torch.tanh(x))
        return x + self.two(torch.tanh(x))


def network(block: Callable[[], nn.Module], scale: float, seed: int = 0) -> nn.Module:
    """Four equal blocks after a stem that ends in a ReLU, weights and statistics random, branches scaled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, CHANNELS, 3), nn.ReLU()]
        model = nn.Sequential(*stem, nn.Sequential(*(block() for _ in range(4))), nn.Flatten(), nn.LazyLinear(5))
        model(noise(1, 3, 8, 8))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
                module.running_mean = torch.randn(CHANNELS)
                module.running_var = 0.5 + torch.rand(CHANNELS)
    return scale_blocks(model, {f"2.{number}": scale for number in range(4)}).eval()


@pytest.mark.parametrize(
    ("block", "into"),
    [
        (Before, ("conv.weight", "conv.bias")),
        (LayerScale, ("gamma",)),
        (Gain, ("conv.weight", "conv.bias", "conv.gain")),
        (Linear, ("outer.weight", "outer.bias")),
    ],
)
@settings(max_examples=5)
@given(scale=st.floats(0.01, 0.99) | st.floats(1.01, 2), seed=st.integers(0, 1000))
def test_folding_is_exact(block: Callable[[], nn.Module], into: tuple[str, ...], scale: float, seed: int) -> None:
    scaled = network(block, scale, seed)
    before = {name: tensor.clone() for name, tensor in scaled.state_dict().items()}
    folded, folds = fold(scaled, noise(2, 3, 8, 8))
    assert hooks(folded) == 0
    expected = [(set(into), f"2.{i}", scale) for i in range(4)]
    assert [(set(record.into), record.block, record.scale) for record in folds] == expected
    images = noise(5, 3, 8, 8, seed=seed + 1)
    assert difference(scaled, folded, images) < 1e-6
    torch.testing.assert_close(folded(images), scaled(images), rtol=1e-4, atol=1e-5)
    assert len(scales_of(scaled)) == 4  # the original is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in scaled.state_dict().items())


@pytest.mark.parametrize(
    ("block", "why"), [(After, "an activation after the sum"), (Two, "more than one residual branch")]
)
def test_what_cannot_be_folded_is_refused_with_the_reason(block: Callable[[], nn.Module], why: str) -> None:
    scaled = network(block, 0.3)
    with pytest.raises(UserError, match=rf"block 2.0 \({block.__name__}\) cannot be folded .*{why}.*`scale=keep`"):
        fold_scale(scaled, noise(2, 3, 8, 8))
    assert len(scales_of(scaled)) == 4


def test_a_fold_before_an_activation_is_approximate() -> None:
    scaled = network(After, 0.3)
    folded, folds = fold(scaled, noise(2, 3, 8, 8), approximate=True)
    assert {record.into for record in folds} == {("norm.weight", "norm.bias")}
    assert not any(record.exact for record in folds)
    block, x = scaled.get_submodule("2.1"), noise(2, CHANNELS, 8, 8).relu()
    torch.testing.assert_close(folded.get_submodule("2.1")(x), F.relu(x + 0.3 * block.norm(block.conv(x))))
    assert 0.001 < difference(scaled, folded, noise(2, 3, 8, 8)) < 1
    with pytest.raises(UserError, match="more than one residual branch"):
        fold(network(Two, 0.3), noise(2, 3, 8, 8), approximate=True)


def test_blocks_within_blocks_and_other_hooks() -> None:
    class OuterSGD(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Sequential(Before(), Before()), nn.Conv2d(CHANNELS, CHANNELS, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.inner(x))

    model = network(OuterSGD, 0.4)
    scale_blocks(model, {f"2.{i}.inner.{j}": 0.7 for i in range(4) for j in range(2)})
    seen: list[int] = []
    model.get_submodule("2.3").register_forward_hook(lambda *_: seen.append(1))
    folded = fold_scale(model, noise(2, 3, 8, 8))
    assert scales_of(folded) == {}
    assert difference(model, folded, noise(3, 3, 8, 8, seed=4)) < 1e-6
    seen.clear()
    folded(noise(2, 3, 8, 8))
    assert seen == [1]


def test_a_block_that_the_example_does_not_reach_is_named() -> None:
    scaled = network(Before, 0.3)
    scaled.aside = Before()
    scale_blocks(scaled, {"aside": 0.5})
    scaled.forward = lambda images: nn.Sequential(*list(scaled)[:-1])(images)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="block aside takes no part"):
        fold_scale(scaled, noise(2, 3, 8, 8))
    with pytest.raises(UserError, match="no block 'nowhere'"):
        scale_blocks(scaled, {"nowhere": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["average", "batch"])
def test_a_trained_job_folds_into_an_ordinary_network(batchnorm: str) -> None:
    job, optimizers = make(resist(3, 2, min_depth=1), batchnorm=batchnorm)
    train(job, optimizers, 5)
    scaled = full_of(job)
    images = batch(7, 0, 9)[0]
    folded = fold_scale(scaled, images[:2])
    assert hooks(folded) == 0
    assert sum(isinstance(h, ScaleBranch) for m in scaled.modules() for h in m._forward_hooks.values()) == BLOCKS
    torch.testing.assert_close(folded(images), scaled(images), rtol=1e-12, atol=1e-12)
    if batchnorm == "average":
        plain = tiny().eval()
        plain.load_state_dict(folded.state_dict())
        torch.testing.assert_close(plain(images), scaled(images), rtol=1e-12, atol=1e-12)
    program = torch.export.export(folded, (images,)).module()
    torch.testing.assert_close(program(images), scaled(images), rtol=1e-12, atol=1e-12)


def test_a_network_whose_outputs_are_nan_is_refused() -> None:
    scaled = network(Before, 0.3)
    assert isinstance(scaled, nn.Sequential)
    with torch.no_grad():
        next(reversed(list(scaled.parameters()))).fill_(torch.nan)  # behind the chain, whose blocks fold exactly
    with pytest.raises(UserError, match="outputs differ by inf"):
        fold_scale(scaled, noise(2, 3, 8, 8))


def test_a_branch_that_the_network_adds() -> None:
    """Its last layer takes the scale; there is no skip connection within the block."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model, x = Adds().eval(), torch.randn(5, 4)
    scale_blocks(model, {f"blocks.{i}": {"scale": 0.3, "outside": True} for i in range(3)})
    folded, folds = fold(model, x)
    assert [record.into for record in folds] == [("2.weight", "2.bias")] * 3
    assert scales_of(folded) == {}
    torch.testing.assert_close(folded(x), model(x))
