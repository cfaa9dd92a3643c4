"""How workers reach one another: a protocol and its two transports, and the ledger of what they carried."""

from resist.comm.distributed import Distributed, connect, meeting_point
from resist.comm.ledger import Ledger
from resist.comm.local import Local
from resist.comm.transport import Handle, Move, Transport, check_agreement, hosting, together, workers_of

__all__ = [
    "Distributed", "Handle", "Ledger", "Local", "Move", "Transport", "check_agreement", "connect", "hosting",
    "meeting_point", "together", "workers_of",
]  # fmt: skip
