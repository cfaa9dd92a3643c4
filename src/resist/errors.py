"""The errors that people see: for what they asked, and for a worker that went away."""


class UserError(ValueError):
    """What was asked cannot be done. The message is one line: the value, the bound, the remedy."""


class AgreedError(UserError):
    """A UserError that every process of the job raises at the same time, so that one of them can speak for all."""


class DivergedError(AgreedError):
    """A worker's loss or weights are no longer numbers; nothing of it was folded into the others'."""


class WorkerLostError(RuntimeError):
    """Another worker died, raised or stayed silent past the timeout during an exchange."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
