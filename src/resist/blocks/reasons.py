"""Reasons why blocks are not a chain."""

from collections.abc import Sequence

from torch import nn

from resist.blocks import compatibility, residual, responses
from resist.blocks.chain import Chain
from resist.blocks.example import Seen


def reason_without_chain(model: nn.Module, found: Sequence[Chain], seen: Seen | None) -> str:
    """Explain why a network has no chain.

    Args:
        model: The full network.
        found: Its runs of equal blocks, the best candidate first.
        seen: What an example shows of the network. Default: blocks were tried with guessed inputs.

    Returns:
        A part of a sentence.
    """
    if not found:
        return compatibility.nearest_miss(model) or (
            "no nn.Sequential or nn.ModuleList has two neighboring blocks of the same class and shapes"
        )
    best = found[0]
    if best.skip_type != residual.UNKNOWN:
        return f"{best.name} is a run of equal blocks, but {reason_without_skip(best, model, seen)}"
    if seen is None:
        return (
            f"the blocks of {best.name} may be residual, but could not be tested outside the network; name the chain "
            f"({best.name}) if they are, or give `example=`"
        )
    name = best.scaled(0)[0][0]
    if (call := seen.calls.get(name)) is None:
        return (
            f"{best.name} is a run of equal blocks, but the network does not call {name} with `example`, or calls "
            "another method of it than forward, so that it cannot be left out; call block(x), or give an example that "
            "runs through it"
        )
    failure = responses.failure_of(model.get_submodule(name), call) or "it takes or returns no hidden state"
    return (
        f"{best.name} is a run of equal blocks, but a copy of {name} could not be tested with the arguments that it "
        f"gets with `example`: {failure}; without an example the chain ({best.name}) can be named"
    )


def reason_without_skip(chain: Chain, model: nn.Module, seen: Seen | None) -> str:
    """Explain why the blocks of a run are not residual.

    Args:
        chain: The run.
        model: The full network.
        seen: As above.

    Returns:
        A part of a sentence.
    """
    reasons: list[str] = []
    for name, _ in chain.scaled(0):
        call = None if seen is None else seen.calls.get(name)
        module = model.get_submodule(name)
        if call is None and seen is not None:
            reasons.append(f"the network does not call {name}")
        elif residual.skip_of(module, call) not in residual.RESIDUAL:
            reasons.append(responses.reason_without_skip(module, call))
    reason = reasons[0] if reasons else "with all its weights zero a block does not return its input"
    if "times its input" in reason:
        return f"its blocks are not x + f(x): {reason}, which a sub-network without it would leave out"
    if reason.endswith("returns zero"):
        reason += (
            "; if the network adds what it returns to its input, give `example=`"
            if seen is None
            else ", and with zero in its place the network does not go on with the state from before it, or it does "
            "more with it than adding it"
        )
    if reason == responses.NOT_SHOWN:
        return f"{reason}; give an example in which its blocks change their input"
    return f"its blocks have no skip connection: {reason}"
