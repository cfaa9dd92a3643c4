"""Which replicas a process keeps while others may be lost."""

import pytest

from resist.errors import WorkerLostError
from resist.sync.local import Local
from resist.sync.replicas import Replica, keep_newest


class Losing(Local):
    """A transport whose other processes are lost."""

    def all_gather_text(self, text: str) -> list[str]:
        raise WorkerLostError("worker 1 is lost")


def test_the_older_replica_stays_until_all_have_the_newer() -> None:
    replicas = [Replica(1, 5, {})]
    with pytest.raises(WorkerLostError):
        keep_newest(Losing(2), replicas, Replica(2, 10, {}))
    assert [replica.round for replica in replicas] == [1, 2]
    keep_newest(Local(2), replicas, Replica(3, 15, {}))
    assert [replica.round for replica in replicas] == [3]
