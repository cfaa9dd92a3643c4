"""ResIST: train a deep residual network on several machines, each with a different, shallower sub-network.

Names are imported when they are first used, so that `import resist` and the commands that train nothing load no torch.
"""

TYPE_CHECKING = False  # as that of typing: nothing is imported before `__main__` looks after interruptions

if TYPE_CHECKING:
    from typing import Any

    from resist import blocks as blocks
    from resist import checking as checking
    from resist import errors as errors
    from resist import job as job
    from resist import planning as planning
    from resist import subnet as subnet
    from resist import sync as sync
    from resist.blocks.chains import Chain, find_chains
    from resist.checking.validate import check_network
    from resist.errors import IncompleteNetworkError, UserError, WorkerLostError
    from resist.job import Job
    from resist.planning.capacities import Capacities
    from resist.planning.plan import Plan, RoundPlan, partition
    from resist.planning.schedule import Message, Schedule, allreduce_bytes, schedule
    from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch
    from resist.planning.wire import Wire
    from resist.runs.library import load_checkpoint, save_checkpoint
    from resist.sync.local import Unconnected
    from resist.sync.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Capacities",
    "Chain",
    "IncompleteNetworkError",
    "Job",
    "Message",
    "OuterSGD",
    "Plan",
    "RoundPlan",
    "Schedule",
    "Strategy",
    "Unconnected",
    "UserError",
    "Wire",
    "Worker",
    "WorkerLostError",
    "allreduce_bytes",
    "check_network",
    "ddp",
    "diloco",
    "find_chains",
    "load_checkpoint",
    "local_sgd",
    "partition",
    "resist",
    "save_checkpoint",
    "schedule",
    "switch",
]

_HOME = {  # the module of each public name
    "Capacities": "resist.planning.capacities",
    "Chain": "resist.blocks.chains",
    "IncompleteNetworkError": "resist.errors",
    "Job": "resist.job",
    "Message": "resist.planning.schedule",
    "OuterSGD": "resist.planning.strategy",
    "Plan": "resist.planning.plan",
    "RoundPlan": "resist.planning.plan",
    "Schedule": "resist.planning.schedule",
    "Strategy": "resist.planning.strategy",
    "Unconnected": "resist.sync.local",
    "UserError": "resist.errors",
    "Wire": "resist.planning.wire",
    "Worker": "resist.sync.worker",
    "WorkerLostError": "resist.errors",
    "allreduce_bytes": "resist.planning.schedule",
    "check_network": "resist.checking.validate",
    "ddp": "resist.planning.strategy",
    "diloco": "resist.planning.strategy",
    "find_chains": "resist.blocks.chains",
    "load_checkpoint": "resist.runs.library",
    "local_sgd": "resist.planning.strategy",
    "partition": "resist.planning.plan",
    "resist": "resist.planning.strategy",
    "save_checkpoint": "resist.runs.library",
    "schedule": "resist.planning.schedule",
    "switch": "resist.planning.strategy",
}
# Imported on first use; their modules need an import: import resist.planning.plan
_SUBMODULES = {"blocks", "checking", "errors", "job", "planning", "subnet", "sync"}


if not TYPE_CHECKING:  # so that type checkers report names that do not exist

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _SUBMODULES:
            return import_module(f"resist.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'resist' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value


def load_ipython_extension(shell: "Any") -> None:
    """Make plans, jobs and runs show themselves in a notebook, after %load_ext resist."""
    from resist.report.notebook import register

    register(shell)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_SUBMODULES})
