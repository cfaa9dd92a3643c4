"""The two errors that people see: one for what they asked, one for a worker that went away."""


class UserError(ValueError):
    """What was asked cannot be done. The message is one line: the value, the bound, the remedy."""


class WorkerLostError(RuntimeError):
    """Another worker died, raised or stayed silent past the timeout during an exchange."""
