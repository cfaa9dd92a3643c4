"""ResIST: train a deep residual network on several machines, each with a different, shallower sub-network."""

from resist.errors import UserError, WorkerLostError
from resist.job import Job
from resist.planning.plan import Plan, partition
from resist.planning.schedule import Message, Schedule, allreduce_bytes, schedule
from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch
from resist.subnet.chains import Chain, find_chains
from resist.sync.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Job",
    "Message",
    "OuterSGD",
    "Plan",
    "Schedule",
    "Strategy",
    "UserError",
    "Worker",
    "WorkerLostError",
    "allreduce_bytes",
    "ddp",
    "diloco",
    "find_chains",
    "local_sgd",
    "partition",
    "resist",
    "schedule",
    "switch",
]
