"""Skip connections, detected by running a block, independent of its name and its code."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resist.blocks.residual import (
    NONE,
    NORM,
    PLAIN,
    RELU,
    SHAPE,
    UNKNOWN,
    Call,
    hidden_in,
    hidden_out,
    skip_of,
    with_hidden,
)
from resist.blocks.responses import NOT_SHOWN, reason_without_skip
from resist.models.preact_cifar import PreActBlock


class Made(nn.Module):
    """A block of two linear layers and a norm, with any forward."""

    def __init__(self, forward: Callable[..., object], width: int = 6) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))
        self._forward = forward

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._forward(self, *args, **kwargs)

    def f(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x)))


BLOCKS: dict[str, tuple[Callable[..., object], str]] = {
    "x + f(x)": (lambda m, x: x + m.f(x), PLAIN),
    "x + f(norm(x))": (lambda m, x: x + m.f(m.norm(x)), PLAIN),
    "x + gain * f(x)": (lambda m, x: x + m.gain * m.f(x), PLAIN),
    "a branch without matrices": (lambda m, x: x + F.avg_pool1d(m.norm(x), 3, 1, 1) - m.norm(x), PLAIN),
    "two branches": (lambda m, x: (y := x + m.f(x)) + m.f(m.norm(y)), PLAIN),
    "in place": (lambda m, x: x.add_(m.f(x)), PLAIN),
    "dropout and noise": (lambda m, x: x + F.dropout(m.f(x), 0.5, True), PLAIN),
    "a tuple": (lambda m, x: (x + m.f(x), None), PLAIN),
    "by name": (lambda m, hidden_states: hidden_states + m.f(hidden_states), PLAIN),
    "relu(x + f(x))": (lambda m, x: F.relu(x + m.f(x)), RELU),
    "norm(x + f(x))": (lambda m, x: m.norm(x + m.f(x)), NORM),
    "norm after norm": (lambda m, x: m.norm((y := m.norm(x + m.f(x))) + m.f(y)), NORM),
    "f(x)": (lambda m, x: m.f(x), NONE),
    "relu(norm(f(x)))": (lambda m, x: F.relu(m.norm(m.f(x))), NONE),
    "2x + f(x)": (lambda m, x: 2 * x + m.f(x), NONE),
    "half of it": (lambda m, x: torch.cat((x[..., :3], m.f(x)[..., 3:]), -1), NONE),
    "mirrored": (lambda m, x: x.flip(-1) + m.f(x), NONE),
    "another shape": (lambda m, x: (x + m.f(x)).flatten(1), SHAPE),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_all_types(name: str) -> None:
    forward, skip_type = BLOCKS[name]
    assert skip_of(Made(forward), Call((torch.randn(2, 4, 6),))) == skip_type
    if name not in ("another shape", "half of it"):  # the first guess, an image, gives another result
        assert skip_of(Made(forward)) == skip_type


@pytest.mark.parametrize("build", [lambda: Made(lambda m, x, size: x), lambda: Made(lambda m, x: {"size": 1}),
                                   lambda: Made(lambda m, xs: [x + m.f(x) for x in xs["all"]])])  # fmt: skip
def test_a_block_that_cannot_be_run_is_unknown(build: Callable[[], nn.Module]) -> None:
    assert skip_of(build()) == UNKNOWN


def test_named_arguments() -> None:
    block = Made(lambda m, *, mask, hidden: hidden + m.f(hidden) * mask)
    call = Call((), {"mask": None, "hidden": torch.randn(2, 3, 6)})
    assert skip_of(block, call) == UNKNOWN  # multiplied by nothing: the call fails
    hidden_first = Made(lambda m, *, hidden, mask: hidden + m.f(hidden) * mask)
    assert skip_of(hidden_first, Call((), {"hidden": torch.randn(2, 3, 6), "mask": torch.ones(6)})) == PLAIN


@pytest.mark.parametrize(
    ("build", "skip_type"),
    [
        (lambda: PreActBlock(4, 4, 1), PLAIN),
        (lambda: PreActBlock(4, 4, 2), SHAPE),
        (lambda: BasicBlock(8, 8), RELU),
        (lambda: Bottleneck(16, 4), RELU),
        (lambda: torchvision.models.vision_transformer.EncoderBlock(2, 8, 16, 0.1, 0.1), PLAIN),
        (lambda: torchvision.models.convnext.CNBlock(8, 1e-6, 0.1), PLAIN),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), PLAIN),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=False), NORM),
        (lambda: torchvision.ops.Conv2dNormActivation(8, 8), NONE),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_of_libraries(build: Callable[[], nn.Module], skip_type: str, device: str) -> None:
    """The result is the same for a block on the meta device."""
    with torch.device(device):
        block = build()
    call = Call((torch.randn(2, 4, 8, 8),)) if skip_type == SHAPE else None
    assert skip_of(block, call) == skip_type


def test_nothing_is_touched() -> None:
    block = PreActBlock(4, 4, 1)
    with torch.no_grad():
        block.norm1.weight.uniform_()
    before, rng = {n: t.clone() for n, t in block.state_dict().items()}, torch.get_rng_state()
    skip_of(block)
    assert torch.equal(rng, torch.get_rng_state())
    assert block.training
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())


def test_forms_of_arguments_and_outputs() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert hidden_in((x, y), {}) is x
    assert hidden_in((), {"mask": None, "hidden": y}) is y
    assert hidden_in((None,), {"hidden": y}) is None
    assert hidden_out((y, 3)) is y
    assert hidden_out([y]) is y
    assert hidden_out({"y": y}) is y
    assert hidden_out({"size": 1, "y": y}) is None
    assert with_hidden({"x": x, "size": 1}, y) == {"x": y, "size": 1}
    assert with_hidden((x, 3), y) == (y, 3)
    assert with_hidden([x], y) == [y]
    assert with_hidden(x, y) is y
    record = torch.return_types.max((x, y))  # type: ignore[attr-defined]
    assert hidden_out(record) is not None


def test_a_gate_that_is_zero_in_the_example_is_opened() -> None:
    block, call = Made(lambda m, x, gate: x + gate * m.f(x)), Call((torch.randn(2, 3, 6), torch.zeros(1)))
    assert skip_of(block, call) == PLAIN
    without_skip = Made(lambda m, x, gate: x * (gate == 0) + gate * m.f(x))
    assert skip_of(without_skip, call) == NONE
    masked = Made(lambda m, x, mask: torch.where(mask, x + m.f(x), x))
    assert skip_of(masked, Call((torch.randn(2, 3, 6), torch.zeros(6, dtype=torch.bool)))) == PLAIN


def test_the_reason_says_where_the_arguments_hide_what_a_block_does() -> None:
    block = Made(lambda m, x, gate: x + min(float(gate.max()), 0.0) * m.f(x))
    call = Call((torch.randn(2, 3, 6), torch.ones(2, 1, 1)))
    assert skip_of(block, call) == NONE
    assert reason_without_skip(block, call) == NOT_SHOWN
