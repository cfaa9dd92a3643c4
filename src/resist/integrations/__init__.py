"""`Job` inside other people's training loops: a callback for Lightning, one for Hugging Face's Trainer.

Both frameworks would rather train one network on all processes of a torchrun: average gradients in every step, and
split the data. Lightning does not where it is given one device; accelerate, which Trainer uses, is kept from it by
`alone`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
          "MASTER_PORT"}  # fmt: skip
_BEGINNINGS = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MV2_")


@contextmanager
def alone() -> Iterator[None]:
    """Inside it, the environment says nothing of the other processes: a framework sees a program of one process.

    Make the `Job` before it, which has to know them.
    """
    hidden = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_BEGINNINGS)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
