"""The compressed mean: numbers of all workers, encoded on their way, become a mean with the same bits everywhere.

Summing codes would overflow or lose digits, so there is no all-reduce of them:

1. Each worker encodes its numbers, and sends one piece of the bytes to each worker.
2. Each worker decodes its piece of all workers, in their order, averages in single precision, encodes the mean, and
   sends it to all. Everybody decodes the same bytes.

Of weights the *change* since the beginning of the round is sent: `anchor`, which all workers agree on, moves by the
decoded mean. What a code loses is an error that its worker adds to the change of the next round, on both sides: of
what it sends, and of the piece that it averages. So what was sent, summed over rounds, tends to what was meant.

A worker that alone knows that its numbers are not finite sends bytes that no finite numbers have, and is left out.

Everything is counted by worker and not by process, so 1, 2 and S processes give the same bits.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from resist.sync.codecs import Codec, RandomBits, round_to_bf16
from resist.sync.transport import Handle, Transport

# Bytes of a worker that is left out. A finite number, or a scale of finite numbers, does not begin with four of them.
ABSENT = 255

Draws = Callable[[int | str], torch.Generator]  # worker, or "mean" and worker -> draws of stochastic rounding


@dataclass
class Feedback:
    """What one worker remembers of a compressed mean of changes.

    Attributes:
        anchor: (numel,) the numbers at the beginning of the round, with equal bits in all workers.
        error: (numel,) bfloat16, what the codes of its changes have lost so far; or None.
        piece_error: (numel of its piece,) bfloat16, the same of the means that it has encoded; or None.
        shared: Numbers of the shared part, the last ones. Errors of others are dropped when workers hold other blocks.
    """

    anchor: Tensor
    error: Tensor | None = None
    piece_error: Tensor | None = None
    shared: int = 0

    def prepare(self, numel: int, piece: int, *, dropped: bool) -> None:
        """Make room for errors of `numel` numbers, of which it averages `piece`; keep those that fit."""
        if self.error is None or self.error.numel() != numel:
            error = self.anchor.new_zeros(numel, dtype=torch.bfloat16)
            if self.error is not None:
                error[numel - self.shared :] = self.error[self.error.numel() - self.shared :]
            self.error, self.piece_error = error, None  # pieces are others, too
        if self.piece_error is None:
            self.piece_error = self.anchor.new_zeros(piece, dtype=torch.bfloat16)
        if dropped:
            self.error.zero_()

    def last(self, numel: int) -> Tensor:
        """Return the anchor of the last numbers: all of them, or the shared part."""
        return self.anchor[self.anchor.numel() - numel :]


class CompressedMean:
    """A compressed mean of all workers, in progress.

    Args:
        transport: Connects the workers.
        codec: The code, of both halves.
        numbers: Hosted worker -> its numbers, (numel,) float32. `finish` replaces them by the mean.
        traffic_kind: The account on which it is booked.
        dropped: Workers that are left out.
        draws: Draws of stochastic rounding: of the codes, or of the errors if the change is sent.
        feedback: Hosted worker -> its anchor and errors, if the change is sent. Default: the numbers themselves are.
        absent: Hosted workers that are left out, which others learn from their bytes. None: there are none anywhere.

    Raises:
        WorkerLostError: If another process is lost; also by `advance` and `finish`.
    """

    @torch.no_grad()
    def __init__(
        self,
        transport: Transport,
        codec: Codec,
        numbers: Mapping[int, Tensor],
        traffic_kind: str,
        *,
        dropped: Set[int],
        draws: Draws,
        feedback: Mapping[int, Feedback] | None = None,
        absent: Set[int] | None = None,
    ) -> None:
        self._transport, self._codec, self._numbers = transport, codec, numbers
        self._kind, self._draws, self._feedback = traffic_kind, draws, feedback
        self._marked = absent is not None
        self._live = [worker for worker in range(transport.num_workers) if worker not in dropped]
        self._numel = next(iter(numbers.values())).numel()
        self._pieces = codec.format.pieces(self._numel, transport.num_workers)
        self._sizes = [codec.num_bytes(piece) for piece in self._pieces]
        encoded: list[Tensor] = []
        for worker, own in numbers.items():
            left_out = worker in dropped or worker in (absent or ())
            if feedback is not None:
                feedback[worker].prepare(self._numel, self._pieces[worker], dropped=left_out)
            encoded.append(self._encode(worker, own, count=not left_out))
        self._scattered = transport.scatter(encoded, self._sizes, traffic_kind)
        self._gathered: Handle | None = None

    def _encode(self, worker: int, numbers: Tensor, *, count: bool) -> Tensor:
        """The bytes that a worker sends: its pieces, one after another. Those of a dropped worker are not read."""
        encoded = torch.empty(sum(self._sizes), dtype=torch.uint8, device=numbers.device)
        if not count:
            return encoded.fill_(ABSENT)
        random = self._random(worker, numbers)
        starts = _starts(self._pieces)
        for start, piece, own in zip(starts, self._pieces, torch.split(encoded, self._sizes), strict=True):
            values = slice(start, start + piece)
            if self._feedback is None:
                self._codec.encode(numbers[values], random, into=own)
            else:
                feedback = self._feedback[worker]
                assert feedback.error is not None
                anchor = feedback.last(self._numel)[values]
                encode_change(self._codec, numbers[values], anchor, feedback.error[values], own, random)
        return encoded

    @torch.no_grad()
    def advance(self) -> None:
        """Average the pieces of the hosted workers, and send the means to all.

        Waits for all processes.
        """
        means: list[Tensor] = []
        for worker, rows in zip(self._numbers, self._scattered.finish(), strict=True):
            assert rows is not None
            mean, encoded = self._mean(rows, self._pieces[worker]), rows.new_empty(self._sizes[worker])
            random = self._random(f"mean {worker}", mean)
            if self._feedback is None:
                self._codec.encode(mean, random, into=encoded)
            else:
                error = self._feedback[worker].piece_error
                assert error is not None
                encode_change(self._codec, mean, None, error, encoded, random)
            means.append(encoded)
        self._gathered = self._transport.gather(means, self._sizes, self._kind)

    def _random(self, who: int | str, numbers: Tensor) -> RandomBits:
        return RandomBits(numbers.numel(), numbers.device, self._draws(who))

    def _mean(self, rows: Tensor, numel: int) -> Tensor:
        """The mean of a piece over the workers that count, in their order."""
        live = [worker for worker in self._live if not (self._marked and _is_absent(rows[worker]))]
        if not live:
            return torch.zeros(numel, dtype=torch.float32, device=rows.device)
        total = self._codec.decode(rows[live[0]], numel)
        for worker in live[1:]:
            for start, end, chunk in self._codec.chunks(numel, rows[worker]):
                total[start:end] += self._codec.decode_chunk(chunk, rows.new_empty(end - start, dtype=total.dtype))
        return total.mul_(1 / len(live))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all hosted workers have the mean."""
        if self._gathered is None:
            self.advance()
        assert self._gathered is not None
        (encoded,) = self._gathered.finish()
        assert encoded is not None
        (first, *others) = self._numbers.items()
        anchor = None if self._feedback is None else self._feedback[first[0]].last(self._numel)
        for start, piece, own in zip(
            _starts(self._pieces), self._pieces, torch.split(encoded, self._sizes), strict=True
        ):
            values = slice(start, start + piece)
            self._codec.decode(own, piece, into=first[1][values], plus=None if anchor is None else anchor[values])
        for _, numbers in others:
            numbers.copy_(first[1])


def encode_change(
    codec: Codec,
    numbers: Tensor,
    anchor: Tensor | None,
    error: Tensor,
    into: Tensor,
    random: RandomBits,
) -> None:
    """Encode `numbers - anchor + error`, to the nearest, and keep what the code loses in `error`.

    Args:
        codec: The code.
        numbers: (numel,) float32.
        anchor: (numel,), or None for zeros.
        error: (numel,) bfloat16, changed in place.
        into: (num_bytes(numel),) uint8 to write to.
        random: Random bits for the rounding of the error. To the nearest, what is far below it would never add up.
    """
    for start, end, chunk in codec.chunks(numbers.numel(), into):
        kept, change = error[start:end], numbers[start:end]
        own = kept.float() if anchor is None else torch.sub(change, anchor[start:end])
        own += change if anchor is None else kept.float()
        codec.encode_chunk(own, chunk, lost=own)
        round_to_bf16(own, random.bits(start, end - start), kept)


def _is_absent(row: Tensor) -> bool:
    """Return True for the bytes of a worker that is left out. Waits for the device."""
    return bool((row[:4] == ABSENT).all())


def _starts(pieces: Sequence[int]) -> list[int]:
    return [sum(pieces[:worker]) for worker in range(len(pieces))]
