"""Skip connections outside of the blocks: `x = x + block(norm(x))` in the forward of the network.

Such a block returns its branch alone. Leaving it out means that it adds nothing, so this is tested in the network: with
zero in place of the outputs of all blocks, the network has to go on behind each block with the state that it had before
it. States are seen where modules are called.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.modules import named_modules
from resist.blocks.rehearsal import Forward, Rehearsal, stand_in
from resist.blocks.residual import hidden_in, hidden_out, with_hidden

SAMPLES = 64  # numbers of a state that are compared


@dataclass(frozen=True)
class _Event:
    """A call of a module, or its return.

    Attributes:
        name: Dotted name of the module.
        returns: True at its return.
        shape: Shape of the hidden state.
        state: Some of its numbers, their mean and the mean of their absolute values.
    """

    name: str
    returns: bool
    shape: torch.Size
    state: Tensor

    def equals(self, other: "_Event") -> bool:
        return self.shape == other.shape and torch.allclose(self.state, other.state, rtol=1e-4, atol=1e-5)

    @property
    def constant(self) -> bool:
        numbers = self.state[:-2]
        return bool((numbers == numbers[0]).all())


class OutsideSkips:
    """Tests of skip connections outside of blocks, in a copy of a network.

    Args:
        model: The full network. It is not changed.
        forward: Function that calls a network with one batch.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self._source, self._forward = model, forward
        self._copied: tuple[Rehearsal, nn.Module] | None = None
        self._plain: list[_Event] | None = None

    def branches(self, blocks: Sequence[Sequence[str]]) -> tuple[int, ...]:
        """Find the modules of a block whose outputs the network adds to its hidden state.

        Args:
            blocks: Dotted names of the modules of each block, corresponding ones at equal positions.

        Returns:
            Their positions, ascending; () if the blocks have no such skip connection.
        """
        if not self._may_pass(blocks):
            return ()
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

    def _may_pass(self, blocks: Sequence[Sequence[str]]) -> bool:
        """False if the modules are not called once each, or none returns the shape that it gets: from one plain run."""
        try:
            self._plain = self._events({}) if self._plain is None else self._plain
        except Exception:  # models of users can raise anything
            return False
        calls = Counter(event.name for event in self._plain if not event.returns)
        shapes = {(event.name, event.shape) for event in self._plain if event.returns}
        kept = {event.name for event in self._plain if not event.returns and (event.name, event.shape) in shapes}
        return all(all(calls[name] == 1 for name in block) and kept & set(block) for block in blocks)

    def _linear(self, block: Sequence[str], blocks: Sequence[Sequence[str]], position: int) -> bool:
        """True if half of a module's output changes the state behind its block by half as much as the whole."""
        rest = {other: 0.0 for names in blocks for other in names if other != block[position]}
        states: list[Tensor] = []
        for factor in (0.0, 0.5, 1.0):
            events = self._events({**rest, block[position]: factor})
            behind = _behind(events, block)
            if behind is None:
                return False
            states.append(behind.state[:-1])  # absolute values are not linear
        none, half, whole = states
        return torch.allclose(half - none, 0.5 * (whole - none), rtol=1e-3, atol=1e-5)

    def _passes(self, blocks: Sequence[Sequence[str]], zeroed: Sequence[int]) -> bool:
        try:
            events = self._events({block[position]: 0.0 for block in blocks for position in zeroed})
        except Exception:  # models of users can raise anything
            return False
        calls = {event.name: number for number, event in enumerate(events) if not event.returns}
        returns = {event.name: number for number, event in enumerate(events) if event.returns}
        called = [event.name for event in events if not event.returns]
        for block in blocks:
            if any(called.count(name) != 1 or name not in returns for name in block):
                return False
            begin = min(calls[name] for name in block)
            for position in zeroed:
                if events[calls[block[position]]].shape != events[returns[block[position]]].shape:
                    return False
            following = _behind(events, block)
            if following is None or following.constant:
                return False
            if not any(following.equals(before) for before in events[: begin + 1]):
                return False
        return True

    def _events(self, factors: Mapping[str, float]) -> list[_Event]:
        """Calls and returns of all modules, with the outputs of some multiplied by a factor."""
        if self._copied is None:
            self._copied = Rehearsal(self._forward, self._source), stand_in(self._source)
        rehearsal, model = self._copied
        events: list[_Event] = []
        handles: list[Any] = []
        for name, module in named_modules(model):

            def call(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name) -> None:
                _append(events, name, False, hidden_in(args, kwargs))

            def ret(_module: nn.Module, _args: object, output: Any, name: str = name) -> Any:
                hidden = hidden_out(output)
                if name in factors and hidden is not None:
                    hidden = factors[name] * hidden if factors[name] else torch.zeros_like(hidden)
                    output = with_hidden(output, hidden)
                _append(events, name, True, hidden)
                return output

            handles += [module.register_forward_pre_hook(call, with_kwargs=True), module.register_forward_hook(ret)]
        try:
            rehearsal.run(model)
        finally:
            for handle in handles:
                handle.remove()
        return events


def _behind(events: Sequence[_Event], block: Sequence[str]) -> _Event | None:
    """The state with which the network goes on behind a block: of the next call, else of the last return."""
    end = max(number for number, event in enumerate(events) if event.returns and event.name in block)
    later = [event for event in events[end + 1 :] if event.shape == events[end].shape]
    return next((event for event in later if not event.returns), later[-1] if later else None)


def _append(events: list[_Event], name: str, returns: bool, hidden: Tensor | None) -> None:
    if hidden is None or not hidden.is_floating_point() or hidden.numel() == 0 or hidden.is_meta:
        return
    flat = hidden.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES).long()
    sums = torch.stack((flat.sum(dtype=torch.float64) / flat.numel(), flat.abs().mean().double()))
    events.append(_Event(name, returns, hidden.shape, torch.cat((flat[index].double(), sums)).cpu()))
