"""Examination: the laws of `resist.checking.validate`, for one network, one example and some chains."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from resist.blocks import residual, responses
from resist.blocks.chain import Chain
from resist.blocks.rehearsal import Rehearsal, describe, snapshot, stand_in
from resist.blocks.residual import OUTSIDE
from resist.blocks.streams import Call, Path, Stream, default_source, default_target, tensors_at
from resist.checking.bypassing import AUXILIARY, bypass, compute_out_of_place
from resist.checking.sharing import share_weights
from resist.checking.trace import Difference, Trace, first_difference, relative, tensors_in
from resist.errors import UserError
from resist.subnet.network import Subnet
from resist.subnet.scaling import scale_branches
from resist.subnet.tensors import values_of

REMEDY = "partition another chain"


@dataclass(frozen=True)
class Checked:
    """Chains that satisfy the laws.

    Attributes:
        chains: The chains, with the places of hidden states that are not the default ones.
        difference: Largest difference of the first law, relative to the largest number; 0.0 means bit for bit.
    """

    chains: tuple[Chain, ...]
    difference: float


class Examination:
    """The laws, for one network, one example and some chains.

    Args:
        rehearsal: The example.
        base: The network, with weights that let differences show. It is not changed.
        chains: Chains to partition.
    """

    def __init__(self, rehearsal: Rehearsal, base: nn.Module, chains: tuple[Chain, ...]) -> None:
        self.rehearsal, self.base, self.chains = rehearsal, base, chains
        self.skip_types = {
            name: skip_type
            for chain in chains
            for block in range(chain.num_blocks)
            for name, skip_type in chain.scaled(block)
        }
        self.streams: dict[str, Stream] = {}
        self.sources: dict[str, Path | None] = {}
        self.auxiliary: tuple[str, ...] = AUXILIARY[:1]

    def run(self) -> Checked:
        """Check the laws.

        Returns:
            The chains, with places of hidden states.

        Raises:
            UserError: If the network breaks a law.
        """
        every = [list(range(chain.num_blocks)) for chain in self.chains]
        expected = self._record()
        difference = self._compare(every, self.rehearsal.modes[0], [expected])
        for training in self.rehearsal.modes:
            # Hold the even blocks, then the odd ones: neighbors are missing, and each end of a chain is missing once.
            with self.rehearsal.products.scope():
                for keep in (0, 1):
                    held = [[block for block in blocks if block % 2 == keep] for blocks in every]
                    self._compare(held, training)
        chains = tuple(self._with_streams(chain) for chain in self.chains)
        self._check_scaling(chains, expected)
        return Checked(chains, difference)

    def _record(self) -> Trace:
        """Laws 3 and 4: look at the first call of every block, and at what it returned."""
        calls: dict[str, Call] = {}
        outputs: dict[str, object] = {}
        model, trace = stand_in(self.base), Trace()
        for name in self.skip_types:

            def enter(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if name not in calls:
                    calls[name] = snapshot(Call(args, kwargs))

            def leave(_module: nn.Module, _args: object, output: object, name: str = name) -> None:
                outputs.setdefault(name, snapshot(Call((output,))).args[0])

            model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True)
            model.get_submodule(name).register_forward_hook(leave)
        trace.follow({name: model.get_submodule(name) for name in self.skip_types})
        trace.end(self.rehearsal.run(model))
        for chain in self.chains:
            names = [name for block in range(chain.num_blocks) for name, _ in chain.scaled(block)]
            missing = [name for name in names if name not in calls]
            if missing:
                raise UserError(
                    f"the network does not call {_some(missing)} of chain {chain.name} with `example`, or not as "
                    f"modules; give an example that runs through them, call block(x) and not block.forward(x), or "
                    f"{REMEDY}"
                )
            self._find_streams(chain, calls, outputs)
        return trace

    def _find_streams(self, chain: Chain, calls: Mapping[str, Call], outputs: Mapping[str, object]) -> None:
        """Find out what each block of a chain adds to."""
        tried: dict[object, residual.Skip] = {}
        for block in range(chain.num_blocks):
            values = repr([attribute.values[block] for attribute in chain.varying])
            for number, (name, skip_type) in enumerate(chain.scaled(block)):
                call, output = calls[name], outputs[name]
                if len(tensors_in(output)) > 1:
                    self.auxiliary = AUXILIARY
                self.sources[name] = default_source(call.args, call.kwargs)
                if skip_type == OUTSIDE:
                    continue
                key = number, values, _form(call)  # blocks with the same attributes are tried once
                if key not in tried:
                    tried[key] = residual.find_skip(self.base.get_submodule(name), call)
                self._check_skip(name, tried[key], call)
                stream = tried[key].stream
                if stream is not None and stream != Stream(self.sources[name] or (), default_target(output) or ()):
                    self.streams[name], self.sources[name] = stream, stream.source

    def _check_skip(self, name: str, skip: residual.Skip, call: Call) -> None:
        if skip.type not in residual.RESIDUAL:
            reason = responses.reason_without_skip(self.base.get_submodule(name), call)
            raise UserError(f"{name} is not a residual block: {reason}; {REMEDY}")
        if skip.others:
            raise UserError(
                f"{name} adds to {len(skip.others) + 1} tensors that it gets and returns, of which only one would be "
                f"scaled in the full network; put them into one tensor, or {REMEDY}"
            )

    def _with_streams(self, chain: Chain) -> Chain:
        names = [name for block in range(chain.num_blocks) for name, _ in chain.scaled(block)]
        return replace(chain, streams=tuple((name, self.streams[name]) for name in names if name in self.streams))

    def _compare(self, held: Sequence[Sequence[int]], training: bool, expected: Sequence[Trace] = ()) -> float:
        """Laws 1 and 2: compare a sub-network with the network without the other blocks. Returns the difference."""
        subnet = Subnet(self.base, self.chains, [len(blocks) for blocks in held])
        subnet.load(values_of(self.base), held)
        share_weights(subnet, held, self.base)
        trace = Trace()
        trace.follow(_branches(subnet, held))
        parts = zip(held, self.chains, strict=True)
        names = " and ".join(f"{' '.join(map(str, blocks))} of {chain.name}" for blocks, chain in parts)
        mode = " in training mode" if training else ""
        try:
            trace.end(self.rehearsal.run(subnet.model, training=training))
        except UserError:
            raise
        except Exception as error:  # models of users can raise anything
            raise UserError(
                f"a sub-network with blocks {names} cannot be run{mode} ({describe(error)}): a worker's network is "
                f"shallower than the whole one, and the network depends on its number of blocks; {REMEDY}"
            ) from error
        difference: Difference | None = None
        for auxiliary in self.auxiliary if not expected else ("",):
            reference = expected[0] if expected else self._reference(held, training, auxiliary)
            found = first_difference(trace, reference)
            if found is None:
                pairs = zip(trace.output.values(), reference.output.values(), strict=True)
                return max((relative(left, right) for left, right in pairs), default=0.0)
            difference = difference or found
        assert difference is not None, "there is a reference"
        raise UserError(
            f"a sub-network with blocks {names} does not compute the same as the network without the others{mode}: "
            f"{self._cause(difference)}; {REMEDY}"
        )

    def _reference(self, held: Sequence[Sequence[int]], training: bool | None = None, auxiliary: str = "") -> Trace:
        """Run the network with the blocks that are not held bypassed."""
        model, trace = stand_in(self.base), Trace()
        followed: dict[str, nn.Module] = {}
        for chain, blocks in zip(self.chains, held, strict=True):
            for block in range(chain.num_blocks):
                for name, skip_type in chain.scaled(block):
                    module = model.get_submodule(name)
                    if block in blocks:
                        followed[name] = module
                    else:
                        bypass(module, self.streams.get(name), auxiliary, outside=skip_type == OUTSIDE)
        trace.follow(followed)
        try:
            return trace.end(self.rehearsal.run(model, training=training))
        except UserError:
            raise
        except Exception as error:  # models of users can raise anything
            raise UserError(f"the network cannot be run with blocks left out ({describe(error)}); {REMEDY}") from error

    def _cause(self, difference: Difference) -> str:
        """Reason why a sub-network differs, from the place where it does."""
        name, place = difference.name, difference.place
        if difference.kind == "end":
            return (
                "what it makes of the states of its blocks, as features, pooling or gains, depends on the position of "
                "a block or on their number"
            )
        if difference.kind == "calls":
            return f"whether it calls {name} depends on the position of a block"
        if difference.kind == "output":
            return f"what {name} computes depends on the position of a block"
        if place[1:] == self.sources[name]:
            return f"the state that {name} gets depends on the position of a block"
        argument = place[1]
        if place[0] == 0:
            parameters = list(inspect.signature(self.base.get_submodule(name).forward).parameters)
            argument = parameters[int(argument)] if int(argument) < len(parameters) else argument
        return f"the argument {argument} of {name} depends on the position of a block"

    def _check_scaling(self, chains: Sequence[Chain], expected: Trace) -> None:
        """Law 5: the network and the scaled network against ones that compute their blocks out of place."""
        scaled = stand_in(self.base)
        trace = self._following(scaled)
        scale_branches(scaled, chains, [0.5] * len(chains))
        trace.end(self.rehearsal.run(scaled))
        for scale, found in ((1.0, expected), (0.5, trace)):
            reference = stand_in(self.base)
            for name, skip_type in self.skip_types.items():
                block = reference.get_submodule(name)
                compute_out_of_place(block, self.streams.get(name), scale, outside=skip_type == OUTSIDE)
            expected = self._following(reference).end(self.rehearsal.run(reference))
            difference = first_difference(found, expected, outputs=False)
            if difference is not None:
                names = " and ".join(chain.name for chain in self.chains)
                raise UserError(
                    f"the blocks of {names} write into a tensor that the network uses again"
                    + (f", seen at {difference.name}" if difference.name else "")
                    + ", so they cannot be scaled: let them compute out of place (x = x + f(x))"
                )

    def _following(self, model: nn.Module) -> Trace:
        trace = Trace()
        trace.follow({name: model.get_submodule(name) for name in self.skip_types}, inputs_only=True)
        return trace


def _branches(subnet: Subnet, held: Sequence[Sequence[int]]) -> dict[str, nn.Module]:
    """The modules of a sub-network that have a branch, by their names in the full network."""
    found: dict[str, nn.Module] = {}
    for number, (chain, blocks) in enumerate(zip(subnet.chains, held, strict=True)):
        for slot, block in enumerate(blocks):
            whole, members = subnet.block(number, slot), chain.members(block)
            modules = [whole] if chain.period == 1 else list(whole.children())
            for name, _ in chain.scaled(block):
                member = next(i for i, one in enumerate(members) if f"{name}.".startswith(f"{one}."))
                found[name] = modules[member].get_submodule(name.removeprefix(members[member]).lstrip("."))
    return found


def _form(call: Call) -> str:
    """Shapes and types of a call, as text."""
    tensors = [(path, tuple(t.shape), t.dtype) for path, t in tensors_at((call.args, dict(call.kwargs)))]
    return repr((tensors, [type(value).__name__ for value in (*call.args, *call.kwargs.values())]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
