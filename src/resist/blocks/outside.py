"""Skip connections outside of the blocks: `x = x + block(norm(x))` in the forward of the network.

Such a block returns its branch alone. Leaving it out means that it adds nothing, so this is tested in the network: with
zero in place of the outputs of all blocks, the network has to go on behind each block with the state that it had before
it. States are seen where modules are called.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.modules import named_modules
from resist.blocks.rehearsal import Rehearsal, stand_in
from resist.blocks.streams import hidden_in, hidden_out, with_hidden

SAMPLES = 256  # numbers of a state that are compared
MOST_FAILURES = 2  # of runs at places that differ in numbers only; further ones are not tried

Blocks = Sequence[Sequence[str]]  # dotted names of the modules of each block, corresponding ones at equal positions


@dataclass(frozen=True)
class _Event:
    """A call of a module, or its return.

    Attributes:
        name: Dotted name of the module.
        returns: True at its return.
        shape: Shape of the hidden state.
        state: Some of its numbers; None where they are not needed.
    """

    name: str
    returns: bool
    shape: torch.Size
    state: Tensor | None

    @property
    def numbers(self) -> Tensor:
        assert self.state is not None, "states of this shape are recorded"
        return self.state.double().cpu()

    def equals(self, other: "_Event") -> bool:
        return self.shape == other.shape and torch.allclose(self.numbers, other.numbers, rtol=1e-4, atol=1e-5)

    @property
    def constant(self) -> bool:
        return bool((self.numbers == self.numbers[0]).all())


class OutsideSkips:
    """Tests of skip connections outside of blocks, in a copy of a network.

    Args:
        rehearsal: The example.
        model: A copy of the full network. It is not changed.
    """

    def __init__(self, rehearsal: Rehearsal, model: nn.Module) -> None:
        self._rehearsal, self._model = rehearsal, model
        self._recording: _Recording | None = None
        self._plain: list[_Event] | None = None
        self._failures = Counter[object]()

    def branches(self, blocks: Blocks) -> tuple[int, ...]:
        """Find the modules of a block whose outputs the network adds to its hidden state.

        Args:
            blocks: Dotted names of the modules of each block, corresponding ones at equal positions.

        Returns:
            Their positions, ascending; () if the blocks have no such skip connection.
        """
        places = tuple(re.sub(r"\d+", "*", name) for name in blocks[0])
        kind = len(blocks), places, tuple(type(self._model.get_submodule(name)) for name in blocks[0])
        if self._failures[kind] >= MOST_FAILURES or not self._may_pass(blocks):
            return ()
        try:
            found = self._branches(blocks)
        except Exception:  # models of users can raise anything
            found = ()
        if not found:
            self._failures[kind] += 1
        return found

    def _may_pass(self, blocks: Blocks) -> bool:
        """False if the modules are not called once each, or none returns the shape that it gets: from one plain run."""
        if self._plain is None:
            try:
                self._plain = self._events({})
            except Exception:  # models of users can raise anything
                self._plain = []
        calls = Counter(event.name for event in self._plain if not event.returns)
        shapes = {(event.name, event.shape) for event in self._plain if event.returns}
        kept = {event.name for event in self._plain if not event.returns and (event.name, event.shape) in shapes}
        return all(all(calls[name] == 1 for name in block) and kept & set(block) for block in blocks)

    def _branches(self, blocks: Blocks) -> tuple[int, ...]:
        zeroed = list(range(len(blocks[0])))
        if not self._passes(blocks, zeroed):
            return ()
        # A module that comes before another one within a branch, such as a norm, is not scaled itself.
        for position in range(len(blocks[0])):
            rest = [other for other in zeroed if other != position]
            if rest and self._passes(blocks, rest):
                zeroed = rest
        # Behind one of the two the state is seen as it is; in between, a function such as a norm may come first.
        for block in (blocks[-1], blocks[0]):
            if all(self._linear(block, blocks, position) for position in zeroed):
                return tuple(zeroed)
        return ()

    def _passes(self, blocks: Blocks, zeroed: Sequence[int]) -> bool:
        """True if the network goes on with the state before each block where some of its modules return zero."""
        try:
            events = self._events({block[position]: 0.0 for block in blocks for position in zeroed}, blocks)
        except Exception:  # models of users can raise anything
            return False
        calls = {event.name: number for number, event in enumerate(events) if not event.returns}
        returns = {event.name: number for number, event in enumerate(events) if event.returns}
        times = Counter(event.name for event in events if not event.returns)
        for block in blocks:
            if any(times[name] != 1 or name not in returns for name in block):
                return False
            begin = min(calls[name] for name in block)
            for position in zeroed:
                if events[calls[block[position]]].shape != events[returns[block[position]]].shape:
                    return False
            following = _behind(events, block)
            if following is None or following.constant:
                return False
            same_shape = (event for event in events[: begin + 1] if event.shape == following.shape)
            if not any(following.equals(before) for before in same_shape):
                return False
        return True

    def _linear(self, block: Sequence[str], blocks: Blocks, position: int) -> bool:
        """True if half of a module's output changes the state behind its block by half as much as the whole."""
        rest = {other: 0.0 for names in blocks for other in names if other != block[position]}
        states: list[Tensor] = []
        for factor in (0.0, 0.5, 1.0):
            behind = _behind(self._events({**rest, block[position]: factor}, [block]), block)
            if behind is None:
                return False
            states.append(behind.numbers)
        none, half, whole = states
        return torch.allclose(half - none, 0.5 * (whole - none), rtol=1e-3, atol=1e-5)

    def _events(self, factors: Mapping[str, float], blocks: Blocks = ()) -> list[_Event]:
        """Calls and returns of all modules, with the outputs of some multiplied by a factor.

        With `blocks`, the run ends behind the last of them, and has the states of the shapes that they return.
        """
        if self._recording is None:
            self._recording = _Recording(stand_in(self._model))
        names = {name for block in blocks for name in block}
        shapes = {event.shape for event in self._plain or () if event.returns and event.name in names}
        return self._recording.run(self._rehearsal, factors, names, shapes)


class _Enough(BaseException):
    """Ends a run whose further events are not needed. Networks may catch every Exception."""


class _Recording:
    """A network that records its events.

    Args:
        model: The network. It gets hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._indices: dict[int, Tensor] = {}
        self._events: list[_Event] = []
        self._factors: Mapping[str, float] = {}
        self._shapes: set[torch.Size] = set()
        self._waiting: set[str] = set()  # modules that have not returned
        self._open: set[torch.Size] = set()  # states that modules have returned and no other one has got since
        for name, module in named_modules(model):
            module.register_forward_pre_hook(self._on_call(name), with_kwargs=True)
            module.register_forward_hook(self._on_return(name))

    def run(
        self, rehearsal: Rehearsal, factors: Mapping[str, float], names: Iterable[str], shapes: set[torch.Size]
    ) -> list[_Event]:
        self._events, self._factors, self._shapes = [], factors, shapes
        self._waiting, self._open = set(names), set()
        with suppress(_Enough):
            rehearsal.run(self._model)
        return self._events

    def _on_call(self, name: str) -> Callable[..., None]:
        def call(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            hidden = hidden_in(args, kwargs)
            if self._add(name, False, hidden) and hidden is not None and hidden.shape in self._open:
                self._open.discard(hidden.shape)
                if not self._waiting and not self._open:
                    raise _Enough

        return call

    def _on_return(self, name: str) -> Callable[..., Any]:
        def ret(_module: nn.Module, _args: object, output: Any) -> Any:
            hidden = hidden_out(output)
            if name in self._factors and hidden is not None:
                factor = self._factors[name]
                hidden = factor * hidden if factor else torch.zeros_like(hidden)
                output = with_hidden(output, hidden)
            if self._add(name, True, hidden) and hidden is not None and name in self._waiting:
                self._waiting.discard(name)
                self._open.add(hidden.shape)
            return output

        return ret

    def _add(self, name: str, returns: bool, hidden: Tensor | None) -> bool:
        if hidden is None or not hidden.is_floating_point() or hidden.numel() == 0 or hidden.is_meta:
            return False
        state = None
        if hidden.shape in self._shapes:
            flat = hidden.detach().reshape(-1)
            state = flat[self._index(flat)]
        self._events.append(_Event(name, returns, hidden.shape, state))
        return True

    def _index(self, flat: Tensor) -> Tensor:
        """Places of the numbers that are compared, at odd distances."""
        size = flat.numel()
        if size not in self._indices:
            self._indices[size] = torch.linspace(0, size - 1, min(size, SAMPLES), dtype=torch.float64).long()
        return self._indices[size]


def _behind(events: Sequence[_Event], block: Sequence[str]) -> _Event | None:
    """The state with which the network goes on behind a block: of the next call, else of the last return."""
    end = max(number for number, event in enumerate(events) if event.returns and event.name in block)
    later = [event for event in events[end + 1 :] if event.shape == events[end].shape]
    return next((event for event in later if not event.returns), later[-1] if later else None)
