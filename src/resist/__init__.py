"""ResIST: train a deep residual network on several machines, each with a different, shallower sub-network."""

from resist.chains import Chain, find_chains
from resist.errors import UserError, WorkerLostError
from resist.job import Job
from resist.plan import Plan, partition
from resist.schedule import Message, Schedule, allreduce_bytes, schedule
from resist.strategy import Outer, Strategy, ddp, diloco, local_sgd, resist, switch
from resist.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Chain", "Job", "Message", "Outer", "Plan", "Schedule", "Strategy", "UserError", "Worker", "WorkerLostError",
    "allreduce_bytes", "ddp", "diloco", "find_chains", "local_sgd", "partition", "resist", "schedule", "switch",
]
