"""Rehearsal: run copies of a network with one example, without a trace in the network or in the random state.

All runs draw the same random numbers, whatever the order and the number of draws, so that a network and its sub-network
can be compared bit for bit even if they drop paths or draw masks.
"""

import copy
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from resist.blocks.comparison import same_tensor
from resist.blocks.copying import activations, copied_module, detached
from resist.blocks.products import Products
from resist.blocks.randomness import seeded_generators
from resist.blocks.streams import Call
from resist.errors import UserError, first_line

Forward = Callable[[nn.Module], object]
MOST_DRAWS = 10_000  # draws with one seed in a run; a network that draws until something happens has to end


class Rehearsal:
    """One example, and the way in which networks can be run with it.

    Args:
        forward: Function that calls a network.
        model: The full network. Copies of it are run to find the way; it is not changed.

    Attributes:
        modes: The modes in which it can be run: evaluation (False), training (True).
        products: Results that the runs have in common.

    Raises:
        UserError: If the network can be run in neither mode.
    """

    def __init__(self, forward: Forward, model: nn.Module) -> None:
        self._forward, self._built_in_training = forward, model.training
        self._ways: dict[bool, tuple[bool, bool]] = {}
        self._forbidden: frozenset[int] = frozenset()
        self._writes_weights = False
        self.products = Products()
        failure: Exception | None = None
        for training in (False, True):
            # Networks of forces differentiate within the forward pass; some kernels take no dispatch mode.
            for grad, repeatable in ((False, True), (True, True), (True, False)):
                self._ways[training] = grad, repeatable
                try:
                    trial = stand_in(model, own_weights=True)
                    versions = [parameter._version for parameter in trial.parameters()]
                    self.run(trial, training=training)
                    # Through `.data`, values are written without a new version; a copy may be written that is equal.
                    self._writes_weights |= versions != [parameter._version for parameter in trial.parameters()]
                    pairs = zip(trial.parameters(), model.parameters(), strict=False)
                    self._writes_weights |= not all(same_tensor(now, before) for now, before in pairs)
                    break
                except Exception as error:  # models of users can raise anything
                    failure = failure or error
                    del self._ways[training]
        if failure is not None and not self._ways:
            raise UserError(
                f"the network cannot be run with `example` ({describe(failure)}); give a batch as in training, on the "
                "CPU, or a function that calls the network with one"
            ) from failure

    @property
    def modes(self) -> tuple[bool, ...]:
        """The modes in which the network can be run."""
        return tuple(self._ways)

    def forbid(self, model: nn.Module) -> None:
        """Let every further run fail that reads a weight of a network, which copies of it do not share.

        Args:
            model: The network.
        """
        self._forbidden = frozenset(
            parameter.untyped_storage().data_ptr()
            for parameter in model.parameters()
            if parameter.layout == torch.strided
        )

    def run(self, model: nn.Module, *, training: bool | None = None) -> object:
        """Run a network.

        Args:
            model: A stand-in of the network, or a sub-network of one. Its buffers may change. Weights that its forward
                pass writes (a momentum encoder) are restored, since copies share them.
            training: The mode, one of `modes`. Default: the first of them.

        Returns:
            The output. It raises what the network raises.

        Raises:
            UserError: If it reads a weight of another network, see `forbid`.
        """
        training = self.modes[0] if training is None else training
        grad, repeatable = self._ways[training]
        if not (training and self._built_in_training):  # else in the modes as built: parts may be frozen
            model.train(training)
        mode = _Repeatable(self._forbidden, self.products)
        self.products.begin(model)
        kept = [(p, p.data, p.data.clone()) for p in model.parameters()] if self._writes_weights else []
        with undisturbed(), torch.device("cpu"), torch.set_grad_enabled(grad), mode if repeatable else nullcontext():
            try:
                output = self._forward(model)
            finally:
                for parameter, data, before in kept:
                    parameter.data = data
                    data.copy_(before)
                if kept:
                    self.products.forget_weights()
        if mode.reads_forbidden:
            raise UserError(
                "a copy of the network reads weights of the network that it was copied from: a function in it (a "
                "lambda, a hook, a method that was stored) keeps a reference; use self in methods of the module instead"
            )
        return output


class _Repeatable(TorchDispatchMode):
    """Mode in which every draw of the same form gives the same numbers.

    Args:
        forbidden: Addresses of storages that are looked for among the arguments.
        products: Computes products.
    """

    def __init__(self, forbidden: frozenset[int], products: Products) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._draws, self._forbidden, self.reads_forbidden = 0, forbidden, False
        self._products = products

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and self._draws < MOST_DRAWS:
            self._draws += 1
            torch.default_generator.manual_seed(0)
        if self._forbidden and not self.reads_forbidden:
            tensors = (v for v in args if type(v) in (Tensor, nn.Parameter) and v.layout == torch.strided)
            self.reads_forbidden = any(t.untyped_storage().data_ptr() in self._forbidden for t in tensors)
        return self._products.compute(func, args, kwargs or {})


@contextmanager
def undisturbed() -> Generator[None]:
    """Context that seeds and restores the random states, compiles nothing and shows no warnings."""
    with seeded_generators(0), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield


def stand_in(model: nn.Module, *, own_weights: bool = False, to_cpu: bool = True) -> nn.Module:
    """Copy a network.

    Args:
        model: Network to copy. It is not changed.
        own_weights: Copy the parameters too. Otherwise those on the CPU are shared.
        to_cpu: Move the copy to the CPU.

    Returns:
        The copy, with buffers of its own. Activations that modules keep are detached.

    Raises:
        UserError: If it cannot be copied.
    """
    memo = detached(activations(model))
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters() if not own_weights else ():
        if parameter.device.type == "cpu":
            memo[id(parameter)] = parameter
    try:
        copied = copied_module(model, memo)
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        return copied if on_cpu or not to_cpu else copied.cpu()
    except Exception as error:  # objects of users can raise anything
        raise UserError(f"the network cannot be copied ({describe(error)}), so it has no sub-networks") from error


def snapshot(call: Call) -> Call:
    """Copy the arguments of a call, so that what is done to them later does not show.

    Args:
        call: The arguments, which may hold tensors at any depth, and objects such as caches.

    Returns:
        The copy, with tensors on the CPU and without their graph. Objects that cannot be copied are the same.
    """
    return Call(*tree_map(_copied, (call.args, dict(call.kwargs))))


def _copied(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu().clone().requires_grad_(leaf.requires_grad and leaf.is_leaf)
    if isinstance(leaf, nn.Module):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # objects of users can raise anything
        return leaf


def describe(error: BaseException) -> str:
    """Return the class and the first line of an exception's text."""
    line = first_line(error)
    return type(error).__name__ if line == type(error).__name__ else f"{type(error).__name__}: {line}"
