"""Checkpoints: each process writes what its workers own to a tensor file, while training continues.

    checkpoints/round-000040/process-0.safetensors ...    state of the job, see `resist.runs.job_state`
                             job.json                     round, step, workers, processes, a digest of every file

A checkpoint appears complete or not at all: the files are written to a folder with another name, which the main process
renames when it sees all of them there. All processes need to see the same folder; nothing else connects them while they
write, so that a slow disk never stands in the way of training, and a lost process costs one checkpoint at most.
"""

import contextlib
import json
import math
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from resist.errors import AgreedError, UserError, WorkerLostError
from resist.job import Job
from resist.runs.atomic import write_atomically
from resist.runs.job_state import owned_state, process_file, round_name
from resist.runs.replicas import remove_replicas
from resist.runs.saved import FORMAT, JOB, complete, digest_of, is_sound, reason_of, verify
from resist.runs.tensor_file import read_description, write_tensors
from resist.state.saving import about_job, check_boundary
from resist.state.values import encode
from resist.sync.agreement import run_everywhere
from resist.sync.transport import Transport

KEEP = 2
ABANDON_S = 5.0  # how long a process that ends by an error waits for its checkpoint
POLL_S = 0.05  # between two looks at the folder


class Checkpoints:
    """Writer of the checkpoints of one run, in the background.

    They are written one at a time, and the newest stay.

    Args:
        folder: RUN/checkpoints, the same for all processes.
        transport: Connects the processes; used in `begin` and `finish`, never in the background.
        possible: Whether all processes see the folder. Where they do not, nothing is written.
        timeout_s: The timeout of `transport` in seconds. The main process waits half of it until it sees the files of
            the others.
        keep: How many to keep.
        replicas: Folder of replicas, of which those that a checkpoint covers are removed; None: there are none.
        remedy: What to do where one cannot be written, for the message.
    """

    def __init__(
        self,
        folder: Path,
        transport: Transport,
        *,
        possible: bool = True,
        timeout_s: float = 600.0,
        keep: int = KEEP,
        replicas: Path | None = None,
        remedy: str = "make room there, then continue with `resume`",
    ) -> None:
        self.folder, self.possible = folder, possible
        self._transport, self._timeout_s = transport, timeout_s
        self._keep, self._replicas, self._remedy = keep, replicas, remedy
        self._process = transport.process_of(transport.hosted[0])
        self._save: _Save | None = None

    def begin(
        self,
        job: Job,
        optimizers: Sequence[Optimizer],
        metadata: Mapping[str, object],
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Copy the job's state after a synchronization, and begin to write it.

        Every process has to call it. Waits for the checkpoint before.

        Args:
            job: The job, between two rounds.
            optimizers: Those of the hosted workers. None: those that the job knows.
            metadata: Further entries of job.json.
            extra: Further values of this process; see `resist.save_checkpoint`.

        Raises:
            UserError: The job is in the middle of a round.
            AgreedError: The checkpoint before could not be written, or this one cannot be begun.
            WorkerLostError: A process did not answer.
        """
        if not self.possible:
            return
        check_boundary(job)
        self.finish()
        if optimizers:
            job.attach(*optimizers)
        # The copy takes CPU memory for everything that this process owns, until it is written.
        staged, own = run_everywhere(self._transport, lambda: _stage(job, extra or {}))
        # A name of its own for each attempt: a process that an earlier attempt left behind writes to another folder.
        attempt, error = secrets.token_hex(4), None
        if self._process == 0:
            partial = self._partial(job.round, attempt)
            try:
                for cut_off in self.folder.glob(".round-*.partial"):
                    shutil.rmtree(cut_off, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as caught:
                error = caught
        attempt = self._agree(error, attempt)
        about = {
            "format": FORMAT,
            **about_job(job),
            "processes": self._transport.num_processes,
            **metadata,
        }
        partial, final = self._partial(job.round, attempt), self.folder / round_name(job.round)
        self._save = _Save(staged, about, own, partial, final, self._process, self._keep, self._replicas)
        self._save.thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete.

        Every process has to call it.

        Raises:
            AgreedError: It could not be written.
            WorkerLostError: A process did not answer.
        """
        save = self._save
        if save is None:
            return
        try:
            save.written.wait()  # ends by itself, with the file or with an error
            self._agree(save.write_error)  # the answer of a process comes after its file
            # Now all files exist. The main process may see them late; the others wait for its answer twice as long.
            save.deadline = time.monotonic() + self._timeout_s / 2
            save.thread.join()
            self._agree(save.error)
        except UserError:
            save.give_up()
            self._save = None
            raise
        self._save = None

    def abandon(self, moment_s: float = ABANDON_S) -> None:
        """After an error: give the checkpoint a moment to become complete, then give it up.

        Args:
            moment_s: Seconds that it gets.
        """
        if self._save is not None:
            self._save.thread.join(moment_s)
            self._save.give_up()

    def _partial(self, round: int, attempt: str) -> Path:
        return self.folder / f".{round_name(round)}-{attempt}.partial"

    def _agree(self, error: BaseException | None, text: str = "") -> str:
        """Raise the error of one process in all. Returns the text of process 0. Waits for all processes."""
        reason = "" if error is None else reason_of(error)
        try:
            answers = [json.loads(answer) for answer in self._transport.all_gather_text(json.dumps([reason, text]))]
        except WorkerLostError as lost:
            if error is None:
                raise
            raise UserError(self._complaint(reason)) from lost
        failed = next((reason for reason, _ in answers if reason), None)
        if failed is not None:
            raise AgreedError(self._complaint(failed))
        return answers[0][1]

    def _complaint(self, reason: str) -> str:
        return (
            f"a checkpoint in {self.folder} could not be written: {reason}; {self._remedy}; older checkpoints are as "
            "they were"
        )


def _stage(job: Job, extra: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy what this process saves: tensors by key, and the values that belong to them."""
    tensors, records = owned_state(job)
    values = encode(dict(extra), tensors, path=("extra",), what="extra")
    staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return staged, {"records": records, "extra": values}


class _Save:
    """One checkpoint on its way to the disk, as one process sees it.

    Attributes:
        thread: Writes the file of this process; in the main process it then completes the checkpoint.
        written: Set when this process has written its file, or could not.
        write_error: The reason that this process could not write its file.
        error: The reason that the checkpoint could not be written or completed.
        deadline: The time (`time.monotonic`) at which the main process stops waiting for the files of the others.
    """

    def __init__(
        self,
        staged: dict[str, Tensor],
        about: dict[str, Any],
        own: dict[str, Any],
        partial: Path,
        final: Path,
        process: int,
        keep: int,
        replicas: Path | None,
    ) -> None:
        self._staged, self._about, self._own, self._partial, self._final = staged, about, own, partial, final
        self._process, self._keep, self._replicas, self.deadline = process, keep, replicas, math.inf
        self._given_up = threading.Event()
        self.written = threading.Event()
        self.write_error: BaseException | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def give_up(self) -> None:
        """Wait for the other processes no longer. The folder under the other name is removed."""
        self._given_up.set()
        if self._process == 0:
            self.thread.join(ABANDON_S)
            if self.error is not None:  # another process may have written into it while it was removed
                shutil.rmtree(self._partial, ignore_errors=True)

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # raised by `finish`, where the training loop can see it
            self.write_error = self.error = error
        self._staged = {}
        self.written.set()
        if self._process != 0:
            return
        try:
            if self.error is None:
                self._complete()
        except BaseException as error:
            self.error = error
        if self.error is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write(self) -> None:
        metadata = {**{name: self._about[name] for name in ("round", "step", "workers")}, **self._own}
        write_tensors(self._partial / process_file(self._process), self._staged, FORMAT, metadata)

    def _complete(self) -> None:
        """In the main process: wait for the files of all processes, write job.json, rename the folder."""
        names = [process_file(process) for process in range(self._about["processes"])]
        self._await(names)
        digests = {name: read_description(self._partial / name, FORMAT).digest for name in names}
        content = {**self._about, "files": digests}
        write_atomically(self._partial / JOB, json.dumps({**content, "digest": digest_of(content)}))
        final = self._final
        if final.exists() and not is_sound(final):  # saved before, by the run that this one resumes, and damaged since
            final.rename(next(p for n in count(1) if not (p := final.with_name(f"damaged-{n}-{final.name}")).exists()))
        elif final.exists():  # the same round again, with other `extra` values: a name that sorts after it
            same = f"{final.name}-*"
            numbers = [
                int(path.name.rpartition("-")[2]) for path in final.parent.glob(same) if path.name[-4:].isdigit()
            ]
            final = final.with_name(f"{final.name}-{max(numbers, default=0) + 1:04}")
        self._partial.rename(final)
        if self._replicas is not None:
            remove_replicas(self._replicas, self._about["round"])
        for older in [path for path in complete(final.parent) if path.name < final.name][self._keep - 1 :]:
            with contextlib.suppress(UserError):  # a damaged one stays, so that its owner can see the reason
                verify(older)
                shutil.rmtree(older, ignore_errors=True)

    def _await(self, names: Sequence[str]) -> None:
        """Wait for files, which appear complete: no message says so, because a process that is lost sends none."""
        while True:
            hopeless = self._given_up.is_set() or time.monotonic() > self.deadline  # noted before the last look
            present = {path.name for path in self._partial.iterdir()}  # unlike a look at one file, never out of a cache
            missing = [process for process, name in enumerate(names) if name not in present]
            if not missing:
                return
            if hopeless:
                processes = ", ".join(map(str, missing))
                raise TimeoutError(f"process 0 does not see the file of process {processes}")
            self._given_up.wait(POLL_S)
