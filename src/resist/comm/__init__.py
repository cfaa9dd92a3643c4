"""How workers reach one another: a protocol and its two transports, and the ledger of what they carried."""

from resist.comm.distributed import Distributed, connect
from resist.comm.ledger import Ledger
from resist.comm.local import Local
from resist.comm.transport import Handle, Move, Transport, check_agreement, together

__all__ = [
    "Distributed", "Handle", "Ledger", "Local", "Move", "Transport", "check_agreement", "connect",
    "together",
]
