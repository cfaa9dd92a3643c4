"""Note of what a job without an example has not checked."""

import logging
from functools import cache

log = logging.getLogger(__name__)


@cache
def note_unchecked() -> None:
    """Log once what a job without an example has not checked."""
    log.warning(
        "resist: without an example, blocks were tried with guessed inputs, and whether sub-networks compute what the "
        "network computes without the other blocks was not checked; give Job one batch, example=batch, to check it in "
        "seconds"
    )
