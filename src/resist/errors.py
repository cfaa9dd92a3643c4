"""Exceptions: invalid user input, diverged training, and lost workers."""


class UserError(ValueError):
    """An invalid option, argument or file.

    The message is one line that names the value, the bound and the remedy.
    """


class AgreedError(UserError):
    """A UserError that all processes raise at the same time.

    So only the first process needs to print it.
    """


class DivergedError(AgreedError):
    """NaN or inf in a worker's loss or weights.

    These weights have not been averaged into those of other workers.
    """


class WorkerLostError(RuntimeError):
    """Contact with another worker was lost.

    Its process ended, or did not answer in time.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text.

    Args:
        error: The exception.

    Returns:
        The line, or the name of the exception's class if it has no text.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
