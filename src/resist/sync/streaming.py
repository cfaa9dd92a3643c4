"""Streaming: what everyone trains is averaged in fragments, each at a time of its own, while training goes on.

A fragment's mean begins with a copy of its numbers, and ends some steps later. All workers agree on its *anchor*, which
moves by the mean of the changes; each worker then has the anchor and what it has trained since the copy:

    anchor += mean over workers of (copy - anchor)
    weights = anchor + (weights - copy)

So nothing that a worker has learned is lost or counted twice: what it trains during the delay, and after it, is in its
next change. One fragment at a time is on its way.
"""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from resist.errors import WorkerLostError
from resist.planning.strategy import OuterSGD
from resist.planning.wire import FP32
from resist.subnet.network import Subnet
from resist.sync.averaging import VELOCITY, all_finite, outer_step
from resist.sync.codecs import CODECS
from resist.sync.compressed_mean import CompressedMean
from resist.sync.fragments import Fragment
from resist.sync.round_end import RoundEnd
from resist.sync.transport import Handle, Transport
from resist.sync.worker import Worker

KIND = "shared"  # the account on which it is booked


class FragmentMean:
    """The mean of one fragment over all workers, in progress.

    Creating it copies the fragment, and begins to send its change. A worker whose numbers are not finite is left out,
    which the others learn from what it sends; its own numbers stay as they are.

    Args:
        transport: Connects the workers.
        workers: The hosted workers.
        number: Number of the fragment.
        end: The end of the round, with the wire format of the change.
        dropped: Further workers that are left out, known to all.

    Raises:
        UserError: If a parameter was moved out of the flat tensor.
        WorkerLostError: If another process is lost; also by `advance` and `finish`.
    """

    @torch.no_grad()
    def __init__(
        self,
        transport: Transport,
        workers: Sequence[Worker],
        number: int,
        end: RoundEnd,
        *,
        dropped: Set[int] = frozenset(),
    ) -> None:
        self._workers = {worker.index: worker for worker in workers}
        self._number, self._num_workers, self._outer = number, transport.num_workers, end.strategy.outer
        for worker in workers:
            worker.take_back()
        self._copies = {index: self._fragment(index).read(_flat(worker)) for index, worker in self._workers.items()}
        absent = {index for index, copy in self._copies.items() if index in dropped or not all_finite(copy)}
        self._plain: Handle | None = None
        self._encoded: CompressedMean | None = None
        self._changes: list[Tensor] = []
        if end.wire.shared == FP32:
            self._changes = [self._change(index, counts=index not in absent) for index in self._copies]
            self._plain = transport.mean(self._changes, KIND)
        else:
            self._encoded = CompressedMean(
                transport,
                CODECS[end.wire.shared],
                self._copies,
                KIND,
                dropped=dropped,
                draws=lambda who: end.draws(_flat(workers[0]).device, "fragment", number, who),
                feedback={index: self._fragment(index).feedback for index in self._copies},
                absent=absent,
            )

    def _fragment(self, index: int) -> Fragment:
        return self._workers[index].fragments[self._number]

    def _change(self, index: int, *, counts: bool) -> Tensor:
        """The change of a worker, and behind it 1 if the worker counts."""
        copy = self._copies[index]
        change = torch.zeros(copy.numel() + 1, dtype=copy.dtype, device=copy.device)
        if counts:
            torch.sub(copy, self._fragment(index).feedback.anchor, out=change[:-1])
            change[-1] = 1.0
        return change

    def advance(self) -> None:
        """Begin the second half of a mean with codes. Waits for all processes, if it is one."""
        if self._encoded is not None:
            self._encoded.advance()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the mean, and take it over in all hosted workers. An outer optimizer takes its step along it.

        Raises:
            WorkerLostError: If another process is lost. The weights have not changed.
        """
        for index, worker in self._workers.items():
            worker.take_back()
            for part, own in self._pairs(index, self._copies[index]):
                part.sub_(own)  # what it has trained since
        try:
            self._wait()
        except WorkerLostError:
            for index in self._workers:
                for part, own in self._pairs(index, self._copies[index]):
                    part.add_(own)
            raise
        for index, worker in self._workers.items():
            mean, feedback = self._copies[index], self._fragment(index).feedback
            if self._outer is not None:
                self._outer_step(worker, mean, feedback.anchor, self._outer)
            feedback.anchor = mean
            for part, own in self._pairs(index, mean):
                part.add_(own)

    def _wait(self) -> None:
        """Replace the copies by the mean. They stay if another process is lost."""
        if self._plain is not None:
            self._plain.finish()
            for index, change in zip(self._copies, self._changes, strict=True):
                self._copies[index] = self._mean(change).add_(self._fragment(index).feedback.anchor)
        if self._encoded is not None:
            self._encoded.finish()

    def _mean(self, change: Tensor) -> Tensor:
        """The mean change of the workers that count: what has arrived is divided by the number of all."""
        count = round(float(change[-1]) * self._num_workers)
        return change[:-1] if count in (0, self._num_workers) else change[:-1].mul_(self._num_workers / count)

    def _pairs(self, index: int, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Ranges of a worker's weights, each with its part of the numbers of the fragment."""
        parts = self._fragment(index).parts(_flat(self._workers[index]))
        return list(zip(parts, torch.split(numbers, [part.numel() for part in parts]), strict=True))

    def _outer_step(self, worker: Worker, mean: Tensor, anchor: Tensor, outer: OuterSGD) -> None:
        velocities = self._fragment(worker.index).parts(worker.state[VELOCITY][torch.float32])
        sizes = [velocity.numel() for velocity in velocities]
        for velocity, new, old in zip(velocities, torch.split(mean, sizes), torch.split(anchor, sizes), strict=True):
            outer_step(new, old, velocity, outer)


class Streaming:
    """The fragments of one round: which is on its way, and which are done.

    Args:
        transport: Connects the workers.
        workers: The hosted workers, which have fragments.
        end: The end of the round, if it has all its steps.

    Attributes:
        done: The fragments that were averaged in this round.
    """

    def __init__(self, transport: Transport, workers: Sequence[Worker], end: RoundEnd) -> None:
        self._transport, self._workers, self._end = transport, workers, end
        self._times = end.wire.times(end.strategy.local_steps)[: len(workers[0].fragments)]
        self._running: FragmentMean | None = None
        self._number = 0  # of the fragment on its way, or of the next one
        self.done: set[int] = set()

    def step(self, steps: int) -> None:
        """Do what is due after a step. A fragment is finished before the next one begins.

        Args:
            steps: Steps done in the round.

        Raises:
            UserError: If a parameter was moved out of the flat tensor.
            WorkerLostError: If another process is lost.
        """
        if self._running is not None:
            times = self._times[self._number]
            if steps >= times.finish:
                self.complete()
            elif steps == times.advance:
                self._running.advance()
        if self._number < len(self._times) and steps == self._times[self._number].begin:
            self._running = FragmentMean(self._transport, self._workers, self._number, self._end)

    def complete(self) -> None:
        """Finish what is on its way. Waits for all processes, if something is; errors as of `step`."""
        running, self._running = self._running, None
        if running is not None:
            running.finish()
            self.done.add(self._number)
            self._number += 1


@torch.no_grad()
def mean_of_weights(transport: Transport, workers: Sequence[Worker], *, blocks: bool) -> Mapping[int, Tensor]:
    """Average what everyone trains over all workers, without changing it.

    Every process has to call it.

    Args:
        transport: Connects the workers.
        workers: The hosted workers.
        blocks: Average blocks, too: every worker holds all of them.

    Returns:
        Hosted worker -> (numel,) the mean, in the order of `SubnetLayout.ranges`; with the same bits in all.

    Raises:
        WorkerLostError: If another process is lost.
    """
    means: dict[int, Tensor] = {}
    for worker in workers:
        layout, flat = worker.subnet.layouts[torch.float32], _flat(worker)
        parts = [flat[start:end] for start, end in layout.ranges(blocks=blocks)]
        means[worker.index] = torch.cat([*parts, flat[:0]])
    transport.mean(list(means.values()), "evaluate").finish()
    return means


@torch.no_grad()
def put_weights(full: Subnet, mean: Tensor, *, blocks: bool) -> None:
    """Give a complete network the result of `mean_of_weights`."""
    ranges = full.layouts[torch.float32].ranges(blocks=blocks)
    for (start, end), own in zip(ranges, torch.split(mean, [end - start for start, end in ranges]), strict=True):
        full.flats[torch.float32][start:end] = own


def _flat(worker: Worker) -> Tensor:
    return worker.subnet.flats[torch.float32]
