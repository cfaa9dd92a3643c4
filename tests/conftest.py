"""One thread everywhere, processes that the tests share, and the order of the tests under pytest-xdist."""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported here, and for every process that a test starts
# The 1x1 convolutions that oneDNN 3.12 (torch 2.14) has for AVX2 and AVX-512 write past the end of a weight's gradient.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
# torch's store asks DNS for the name of each address that connects, and serves nobody meanwhile: 5 s at a lost packet.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.internal.conjecture import providers

from commands import Commands
from pool import Pool, seed_everything
from resist.cli import guard

torch.set_num_threads(1)

# A loaded machine is slow at times, and that is no failure. Derandomized: a run of the tests is the same everywhere.
# hypothesis also draws constants from the modules that are imported at that moment, which under pytest-xdist depend on
# the tests that ran before: none, then.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants
hypothesis.settings.register_profile(
    "day",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("nightly", hypothesis.settings.get_profile("day"), max_examples=600)


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile before the tests are collected; some take a part of its number of examples."""
    hypothesis.settings.load_profile("nightly" if config.getoption("markexpr") in ("", "nightly") else "day")


# Under pytest-xdist a process runs whole files, whose tests share fixtures. One process runs those of ALONE, which
# measure time or list the network namespaces of this machine. The long ones come first: no process waits in the end.
ALONE = ("test_wire.py", "test_report_browser.py")
FIRST = (*ALONE, "test_faults.py", "test_cli.py", "test_resume.py", "test_distributed.py", "test_optimizers.py")
FIRST += (
    "test_export.py",
    "test_examples.py",
    "test_evaluation.py",
    "test_average.py",
    "test_docs.py",
    "test_notebook.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        order = {name: number for number, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "alone" if file.endswith(ALONE) else file

    return Files(config, log)


def pytest_runtest_setup() -> None:
    seed_everything()
    # As it is after an import; a command that a test runs in this process shows the log.
    log = logging.getLogger("resist")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _no_internal_error(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which a command ends with "internal error", unless it is marked so: nobody foresaw the error."""
    unforeseen: list[BaseException] = []
    internal = guard._internal
    monkeypatch.setattr(guard, "_internal", lambda error: (unforeseen.append(error), internal(error))[1])
    yield
    if unforeseen and request.node.get_closest_marker("internal_error") is None:
        raise unforeseen[0]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that are joined by gloo for each call: `pool.run(2, function, argument)`."""
    with Pool() as processes:
        yield processes


@pytest.fixture(scope="session")
def _commands() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture
def commands(_commands: Commands) -> Iterator[Commands]:
    """`resist` in processes of its own, forked from one that has imported torch; none outlives the test."""
    yield _commands
    _commands.end_all()
