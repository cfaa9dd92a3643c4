"""One thread everywhere, and a pool of processes that the tests share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported here, and for every process that a test starts
if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as cpuinfo:
        if "avx512" not in cpuinfo.read():
            # The 1x1 convolutions that oneDNN 3.12 (torch 2.14) has for AVX2 write past the end of a weight's gradient.
            os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from pool import Pool

torch.set_num_threads(1)

# A loaded machine is slow at times, and that is no failure. Derandomized: a run of the tests is the same everywhere.
hypothesis.settings.register_profile(
    "resist",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("resist")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that are joined by gloo for each call: `pool.run(2, function, argument)`."""
    with Pool() as processes:
        yield processes
