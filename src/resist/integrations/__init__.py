"""Integrations of `Job`: callbacks for Lightning and for Hugging Face's Trainer.

By default, both frameworks train one network on all processes of a torchrun: they average gradients in every step and
split the data. Lightning does not if it gets one device; `alone` prevents it for accelerate, which Trainer uses.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
          "MASTER_PORT"}  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MV2_")


@contextmanager
def alone() -> Iterator[None]:
    """Hide the environment variables of distributed launchers within a context.

    A framework then sees a program of one process. Create the `Job` before entering it,
    because the `Job` needs these variables. They are restored at exit.
    """
    hidden = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
