"""Exceptions: invalid user input, diverged training, and lost workers."""


class UserError(ValueError):
    """An invalid option, argument or file.

    The message is one line that names the value, the bound and the remedy.
    """


class AgreedError(UserError):
    """A UserError that all processes of a job raise at the same time, so that only the first one needs to print it."""


class DivergedError(AgreedError):
    """NaN or inf in a worker's loss or weights. These weights have not been averaged into those of other workers."""


class WorkerLostError(RuntimeError):
    """Contact with another worker was lost during an exchange: its process ended, or did not answer in time."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
