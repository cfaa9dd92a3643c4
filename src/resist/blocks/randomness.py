"""Random generators of the CPU, seeded within a context."""

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from resist.blocks.modules import fork_rng


@contextmanager
def seeded_generators(seed: int) -> Generator[None]:
    """Seed the generators of torch (CPU), of Python and of numpy, if it is imported, and restore them at the end.

    `torch.manual_seed` would also seed the generators of all devices, which are not restored here.

    Args:
        seed: Seed of the generators.
    """
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    with fork_rng():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
