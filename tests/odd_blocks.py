"""Blocks that keep the values in which they differ in every form that Python has."""

import dataclasses
import enum
import functools
import logging
import random
import re
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

BLOCKS, WIDTH = 6, 8


def value(number: int) -> float:
    return 0.1 * (number + 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module], after: Callable[["Net"], None] | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(make(number) for number in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        if after is not None:
            after(self)

    def forward(self, x: Tensor, blocks: list[int] | None = None) -> Tensor:
        """The output; with `blocks`, without the others."""
        x = self.stem(x)
        for block in self.blocks if blocks is None else [self.blocks[number] for number in blocks]:
            x = block(x)
        return self.head(self.norm(x))


class Config:
    def __init__(self, a: float) -> None:
        self.inner, self.me = {"x": [a, (a,)]}, self

    def times(self, x: float) -> float:
        return self.inner["x"][1][0] * x


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: float


class Slots:
    __slots__ = ("__a",)

    def __init__(self, a: float) -> None:
        self.__a = a

    def get(self) -> float:
        return self.__a


class Rate(enum.Enum):
    R1, R2, R3, R4, R5, R6 = 1, 2, 3, 4, 5, 6


Pair = namedtuple("Pair", "a b")


def with_default(a: float) -> Callable[..., float]:
    def times(x: float, k: float = a) -> float:
        return x * k

    return times


def cycle(a: float) -> list[Any]:
    items: list[Any] = [a]
    items.append(items)
    return items


# The attribute of a block, made from a number, and the number that its forward pass gets from it.
FORMS: dict[str, tuple[Callable[[float], Any], Callable[[Any], Any]]] = {
    "float": (float, float),
    "tensor_0d": (torch.tensor, lambda v: v),
    "tensor_1d": (lambda a: torch.full((WIDTH,), a), lambda v: v),
    "sparse_tensor": (lambda a: torch.eye(WIDTH).to_sparse() * a, lambda v: v.to_dense()[0, 0]),
    "bf16_tensor": (lambda a: torch.tensor(a, dtype=torch.bfloat16), float),
    "numpy_scalar": (np.float32, float),
    "numpy_array": (lambda a: np.array([a, a]), lambda v: float(v[0])),
    "numpy_objects": (lambda a: np.array([a, "x"], dtype=object), lambda v: float(v[0])),
    "config": (Config, lambda v: v.inner["x"][0]),
    "frozen_dataclass": (Frozen, lambda v: v.a),
    "slots": (Slots, lambda v: v.get()),
    "set": (lambda a: {a, "x"}, lambda v: sum(i for i in v if i != "x")),
    "frozenset": (lambda a: frozenset([a]), lambda v: next(iter(v))),
    "set_of_objects": (lambda a: {Frozen(a), Frozen(0.0)}, lambda v: sum(i.a for i in v)),
    "lambda": (lambda a: lambda x: x * a, lambda v: v(1.0)),
    "default": (with_default, lambda v: v(1.0)),
    "partial": (lambda a: functools.partial(lambda k, x: k * x, a), lambda v: v(1.0)),
    "bound_method": (lambda a: Config(a).times, lambda v: v(1.0)),
    "builtin_method": (lambda a: {"x": a}.get, lambda v: v("x")),
    "enum": (lambda a: Rate(round(10 * a)), lambda v: v.value / 10),
    "named_tuple": (lambda a: Pair(a, [a]), lambda v: v.b[0]),
    "deque": (lambda a: deque([a], maxlen=2), lambda v: v[0]),
    "defaultdict": (lambda a: defaultdict(lambda: a), lambda v: v.default_factory()),
    "class": (lambda a: type("Made", (), {"a": a}), lambda v: v.a),
    "nested": (lambda a: {"d": torch.device("cpu"), "l": [{"a": (a,)}]}, lambda v: v["l"][0]["a"][0]),
    "cycle": (cycle, lambda v: v[1][1][0]),
    "hidden_module": (lambda a: [nn.Dropout(a)], lambda v: v[0].p),
    "hidden_modules": (lambda a: OrderedDict(a=nn.Hardtanh(0, a)), lambda v: v["a"].max_val),
    "cached": (lambda a: functools.lru_cache(lambda n: n * a), lambda v: v(1)),
    "generator": (
        lambda a: torch.Generator().manual_seed(round(10 * a)),
        lambda v: float(torch.rand(1, generator=v.clone_state())),
    ),
    "numpy_random": (lambda a: np.random.RandomState(round(10 * a)), lambda v: v.get_state()[1][0] / 10),
    "complex_and_slice": (lambda a: [complex(a, 1), slice(0, a), float("nan"), float("inf")], lambda v: v[0].real),
}


class Formed(Block):
    def __init__(self, form: str, name: str, number: int) -> None:
        super().__init__()
        self.__dict__[name] = FORMS[form][0](value(number))
        self.form, self.name = form, name

    def forward(self, x: Tensor) -> Tensor:
        return x + FORMS[self.form][1](self.__dict__[self.name]) * self.branch(x)


# Kinds of blocks by name: a function of the number of the block, or a class.
KINDS: dict[str, Callable[[int], nn.Module]] = {}
# What is done to the network afterwards.
AFTER: dict[str, Callable[[Net], None]] = {}


def kind(make: Any) -> Any:
    KINDS[make.__name__] = make
    return make


@kind
class ModuleWithSlots(Block):
    __slots__ = ("_k",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self._k = value(number)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._k * self.branch(x)


@kind
class ClosureOverSelf(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        a = value(number)
        self.run = lambda x: a * self.branch(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.run(x)


@kind
class ClosureOverLayers(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        layers = [self.norm, self.fc]

        def run(x: Tensor, depth: int = 0) -> Tensor:
            return x if depth == len(layers) else run(layers[depth](x), depth + 1)

        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return x + self.run(x)


@kind
class References(Block):
    """To its own layers and weights, in every form."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers, self.me, self.weights = [self.norm, self.fc], [self], {"w": self.fc.weight}
        self.weak, self.call = weakref.ref(self), self.fc.forward

    def forward(self, x: Tensor) -> Tensor:
        y = self.weak().call(self.layers[1](self.layers[0](x)))
        return x + self.me[0].fc(nn.functional.linear(y, self.weights["w"]))


@kind
class ReferencesAndValue(Block):
    """Values that differ and references to its own layers in one attribute."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.c = {"m": self.fc, "a": value(number), "w": weakref.ref(self.norm), "f": self.normed}

    def normed(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c["a"] * self.c["m"](self.c["f"](self.c["w"]()(x)))


class Caller:
    def __init__(self, a: float, block: Block) -> None:
        self.a, self.block = a, block

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * self.block.branch(x)


@kind
class ObjectWithItsBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.call = Caller(value(number), self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(x)


@kind
def class_attribute(number: int) -> nn.Module:
    class Made(Block):
        a = value(number)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a * self.branch(x)

    return Made()


@kind
def class_closure(number: int) -> nn.Module:
    a = value(number)

    class Made(Block):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x + a * super().branch(x)

    return Made()


class Based(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a * self.branch(x)  # type: ignore[operator]


@kind
def type_call(number: int) -> nn.Module:
    return type(f"Block{number}", (Based,), {"a": value(number)})()


@kind
class ForwardOfInstance(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        a = value(number)
        self.forward = lambda x: x + a * self.branch(x)


@kind
class MethodOfInstance(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.forward = types.MethodType(lambda self, x: x + value(self.number) * self.branch(x), self)


@kind
class OnlyInSome(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        if number == 2:
            self.special = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, "special", 1.0) * self.branch(x)


@kind
class Magic(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.options, self._number = {"alpha": value(number)}, number

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            options = self.__dict__.get("options", {})
            return options[name] if name in options else getattr(self.fc, name)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * value(self._number) * self.branch(x)


@kind
class Property(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.rate = value(number)

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate, self._twice = rate, 2 * rate

    def forward(self, x: Tensor) -> Tensor:
        return x + self._twice * self.branch(x)


@kind
class Setter(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.r = value(number)

    def __setattr__(self, name: str, item: Any) -> None:
        super().__setattr__(name, item)
        if name == "r":
            super().__setattr__("squared", item * item)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.squared * self.branch(x)  # type: ignore[operator]


@kind
class Activations(Block):
    """Keeps what it computes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.aux, self.calls = number, None, 0

    def forward(self, x: Tensor) -> Tensor:
        y = value(self.number) * self.branch(x)
        self.calls += 1
        self.aux, self.last_shape, self.cache = (y**2).mean(), tuple(x.shape), [{"y": y}]
        return x + y


@kind
class Handles(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.lock, self.log, self.text = threading.Lock(), logging.getLogger(f"l{number}"), re.compile("a")
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return x + value(self.number) * self.branch(x)


@kind
class Functions(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.act = [torch.relu, torch.tanh][number % 2]
        self.function = [nn.functional.gelu, nn.functional.silu][number % 2]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.function(self.act(self.norm(x))))


@kind
class EqualHooks(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.fc.register_forward_hook(lambda module, args, output: output + 0.1 * self.norm(output))


@kind
class HooksThatDiffer(Block):
    """In number, values and references."""

    def __init__(self, number: int) -> None:
        super().__init__()
        a = value(number)
        for _ in range(number % 3):
            self.fc.register_forward_hook(lambda module, args, output: a * output + self.norm(args[0]))
        if number > 3:
            self.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


SHARED = Config(0.3)


@kind
class SharedConfig(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.config, self.number = SHARED, number

    def forward(self, x: Tensor) -> Tensor:
        return x + value(self.number) * self.config.times(1.0) * self.branch(x)


@kind
class Parent(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.root: list[Net] = []

    def forward(self, x: Tensor) -> Tensor:
        root = self.root[0]
        return x + self.branch(x) * root.head.weight.mean() * self.net().stem(x)  # type: ignore[operator]


def _parents(net: Net) -> None:
    for block in net.blocks:
        block.root.append(net)  # type: ignore[union-attr,operator]
        block.__dict__["net"] = weakref.ref(net)


AFTER["Parent"] = _parents


@kind
class Recurrent(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x[:, None])[0][:, 0]


class Buffers(Block):
    """A table of integers, a mask with infinities, and flags, which differ."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(WIDTH).roll(number))
        self.register_buffer("mask", torch.full((WIDTH,), float("-inf")).roll(1), persistent=False)
        self.register_buffer("flags", torch.arange(WIDTH) % (number + 2) == 0)
        self.mask[: number + 1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)[:, self.table] * self.mask.softmax(0) * self.flags


KINDS["Buffers"] = Buffers


@kind
class Drawn(Block):
    """Values drawn by Python and numpy."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.a, self.b = random.random(), float(np.random.rand())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a * self.b * self.branch(x)


@kind
class Lazy(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(WIDTH)


def _run(net: Net) -> None:
    with torch.no_grad():
        net(torch.zeros(2, WIDTH))


AFTER["Lazy"] = _run


@kind
class Scripted(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.fc = torch.jit.script(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x + value(self.number) * self.branch(x)


@kind
class WeightNorm(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        parametrizations.weight_norm(self.fc)


@kind
class SpectralNorm(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.fc)


@kind
class Orthogonal(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        parametrizations.orthogonal(self.fc)


class Symmetric(nn.Module):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, weight: Tensor) -> Tensor:
        return self.a * (weight + weight.T)


@kind
class Parametrized(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        parametrize.register_parametrization(self.fc, "weight", Symmetric(value(number)))


@kind
class Pruned(Block):
    def __init__(self, number: int) -> None:
        super().__init__()
        prune.l1_unstructured(self.fc, "weight", amount=0.3)


@kind
class PrunedOverall(Block):
    """Masks of their own, as of `prune.global_unstructured`, and pruned twice."""

    def __init__(self, number: int) -> None:
        super().__init__()
        prune.custom_from_mask(self.fc, "weight", torch.rand(WIDTH, WIDTH) > value(number))
        if number % 2:
            prune.random_unstructured(self.fc, "weight", amount=0.1)


def build(name: str) -> Net:
    """The network with blocks of one kind, or of one form: `form.attribute`."""
    if name in KINDS:
        return Net(KINDS[name], AFTER.get(name))
    form, _, attribute = name.partition(".")
    return Net(functools.partial(Formed, form, attribute))
