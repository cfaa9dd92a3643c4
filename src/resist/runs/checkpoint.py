"""Checkpoints: each process writes what its workers own, under global dotted names, while training goes on.

    checkpoints/round-000040/           appears complete or not at all: it is written under another name, then renamed
        __0_0.distcp ...                torch.distributed.checkpoint, a file or more for each process
        job.json                        round, step, workers, configuration, and a digest of every other file

Weights are there once: the shared part from worker 0, a block from its first holder. What differs between workers (the
optimizer's state, counters, outer momentum) is there for each, as `workers.2.momentum_buffer.layer3.5.conv1.weight`.
All processes have to see the same folder. Nothing that is read is unpickled but the classes of DCP's own index.
"""

import contextlib
import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from resist.errors import AgreedError, UserError, WorkerLostError
from resist.job import Job
from resist.runs.rescue import remove_replicas
from resist.sync.averaging import VELOCITY
from resist.sync.transport import Transport
from resist.sync.worker import Worker

FORMAT = "resist checkpoint 2"
INDEX = ".metadata"  # DCP's own
JOB = "job.json"
KEEP = 2
LEAST = {"round": 0, "step": 0, "workers": 1}
ABANDON_S = 5.0
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, CheckpointException)


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, in the background; keeps the newest KEEP.

    possible: whether all processes see the folder. Where they do not, nothing is written.
    """

    def __init__(self, folder: Path, transport: Transport, *, possible: bool = True) -> None:
        self.folder, self._transport, self.possible = folder, transport, possible
        self._first = 0 in transport.hosted
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, job: Job, optimizers: tuple[Optimizer, ...], facts: Mapping[str, object]) -> None:
        """Copy the job's state as it is after a synchronization, and begin to write it. Every process has to call it.

        Waits for the checkpoint before, and raises AgreedError where that one could not be written.
        """
        if not self.possible:
            return
        self.finish()
        final = self.folder / f"round-{job.round:06d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            if self._first:
                if partial.exists():
                    shutil.rmtree(partial)  # cut off by an earlier end
                partial.mkdir(parents=True)
        except OSError as error:
            self._error = error
        self._agree()
        staged = {name: tensor.detach().cpu().clone() for name, tensor in owned(job, optimizers)}
        about = {"format": FORMAT, "round": job.round, "step": job.step_index, "workers": job.strategy.workers, **facts}
        self._thread = threading.Thread(target=self._write, args=(staged, about, partial, final), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until what was begun is complete. Every process has to call it.

        Raises AgreedError where it could not be written, and WorkerLostError where a process did not write its part.
        """
        if self._thread is None:
            return
        self._thread.join()  # ends by itself: the group that it waits on has a timeout
        self._thread, error = None, self._error
        if isinstance(error, RuntimeError) and self._transport.num_processes > 1:  # of the group, not of the disk
            raise self._transport.lost("writing a checkpoint", error)
        try:
            self._agree()
        except WorkerLostError as lost:
            if error is None:
                raise
            raise UserError(self._complaint(_reason(error))) from lost  # the others wait in vain for this process

    def abandon(self) -> None:
        """Before the process ends by an error: give what is being written a moment to get complete.

        The others' parts may be there already, and a process must not end while a thread of it waits for others.
        """
        if self._thread is not None:
            self._thread.join(ABANDON_S)

    def _agree(self) -> None:
        """Raise the error of one process in all."""
        texts = self._transport.all_gather_text("" if self._error is None else _reason(self._error))
        self._error = None
        reason = next((text for text in texts if text), None)
        if reason is not None:
            raise AgreedError(self._complaint(reason))

    def _complaint(self, reason: str) -> str:
        return (
            f"a checkpoint in {self.folder} could not be written: {reason}; make room there, then go on with --resume; "
            "older checkpoints are as they were"
        )

    def _write(self, staged: dict[str, Tensor], about: dict[str, object], partial: Path, final: Path) -> None:
        try:
            writer = FileSystemWriter(partial, single_file_per_rank=True)
            group, alone = self._transport.background, self._transport.num_processes == 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the same of writing
                save(staged, storage_writer=writer, process_group=group, no_dist=alone)
            if self._first:
                self._complete(partial, final, about)
        except BaseException as error:  # it is raised where the training loop can see it
            self._error = error
            if self._first:
                shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, partial: Path, final: Path, facts: dict[str, object]) -> None:
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        content = {**facts, "files": files}
        with (partial / JOB).open("w", encoding="utf-8") as file:
            json.dump({**content, "digest": _digest_of(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():  # saved before, by the run that this one goes on with, and damaged since
            final.rename(next(p for n in count(1) if not (p := final.with_name(f"damaged-{n}-{final.name}")).exists()))
        partial.rename(final)
        remove_replicas(self.folder.parent / "replicas", int(str(facts["round"])))
        for old in [path for path in complete(self.folder) if path.name < final.name][KEEP - 1 :]:
            with contextlib.suppress(UserError):  # a damaged one stays, for whoever wants to see why
                about(old)
                shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first, sound or not."""
    return sorted((p for p in folder.glob("round-*") if p.is_dir()), reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and a line about each newer one that is damaged and skipped."""
    skipped: list[str] = []
    for path in complete(folder):
        try:
            about(path)
            return path, skipped
        except UserError as error:
            skipped.append(f"{error}; skipped")
    return None, skipped


def about(path: Path) -> dict[str, Any]:
    """What job.json says, after a look at every file. Raises UserError, in one line, where anything is wrong."""
    try:
        facts = json.loads((path / JOB).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has the format {facts['format']!r}, not {FORMAT!r}")
        if facts.pop("digest") != _digest_of(facts):
            raise UserError(f"checkpoint {path} is damaged: {JOB} is not as it was written")
        if any(type(facts[name]) is not int or facts[name] < least for name, least in LEAST.items()):
            raise UserError(f"checkpoint {path} is damaged: {JOB} has a {', '.join(LEAST)} that cannot be")
        for name, digest in dict(facts["files"]).items():
            if _digest(path / Path(name).name) != digest:
                raise UserError(f"checkpoint {path} is damaged: {name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} is damaged: {_reason(error)}") from error
    return facts


def restore(job: Job, optimizers: tuple[Optimizer, ...], path: Path, *, same_workers: bool) -> None:
    """Give a job that was made for this round the weights of a checkpoint and, where the number of workers is the same,
    everything else too. The job is left as it was if the checkpoint cannot be read. Each process reads what it needs.
    """
    reader = SafeReader(path)
    try:
        index = reader.read_metadata().state_dict_metadata
        wanted: dict[str, Tensor] = {}
        for worker in job.workers:
            names = list(worker.subnet.state(job.held_by(worker)))
            if same_workers:
                names += [name for name in index if name.startswith(f"workers.{worker.index}.")]
            wanted |= {name: _room(index, name) for name in names}
        with warnings.catch_warnings():  # torch warns that it reads in one process: each reads what it needs
            warnings.simplefilter("ignore", UserWarning)
            load(wanted, storage_reader=reader, no_dist=True)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}; give another one") from error
    with torch.no_grad():
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            _fill(job, worker, optimizer, wanted)
    job.mark_anchors()


def _fill(job: Job, worker: Worker, optimizer: Optimizer, found: Mapping[str, Tensor]) -> None:
    held = job.held_by(worker)
    for name, view in worker.subnet.state(held).items():
        view.copy_(found[name])
    prefix = f"workers.{worker.index}."
    own = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    for name, buffer in _integers(worker):
        if f"buffers.{name}" in own:
            buffer.copy_(own[f"buffers.{name}"])
    for parameter, name in _named(job, worker):
        for kind in {key.removesuffix(f".{name}") for key in own if key.endswith(f".{name}")} - {"buffers", VELOCITY}:
            value = own[f"{kind}.{name}"]
            same = value.shape == parameter.shape and value.numel() > 1
            optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(value) if same else value
    if any(key.startswith(f"{VELOCITY}.") for key in own):
        velocity = worker.state.setdefault(VELOCITY, torch.zeros_like(worker.subnet.flat))
        for name, view in worker.subnet.state(held, velocity).items():
            view.copy_(own[f"{VELOCITY}.{name}"])


def owned(job: Job, optimizers: tuple[Optimizer, ...]) -> Iterator[tuple[str, Tensor]]:
    """Everything that this process writes of a job between two rounds, by global name."""
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        prefix, held = f"workers.{worker.index}", job.held_by(worker)
        first_holder = {
            f"{chain.block_name(block)}.": job.plans[chain.name].holders(block)[0] == worker.index
            for number, chain in enumerate(job.chains)
            for block in held[number]
        }
        for name, view in worker.subnet.state(held).items():
            block = next((b for b in first_holder if name.startswith(b)), None)
            if first_holder[block] if block is not None else worker.index == 0:
                yield name, view
        for parameter, name in _named(job, worker):
            for kind, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}.{kind}.{name}", value
        for name, buffer in _integers(worker):
            yield f"{prefix}.buffers.{name}", buffer
        if VELOCITY in worker.state:
            for name, view in worker.subnet.state(held, worker.state[VELOCITY]).items():
                yield f"{prefix}.{VELOCITY}.{name}", view


def _named(job: Job, worker: Worker) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """The worker's parameters with their global dotted names."""
    held = job.held_by(worker)
    for parameter, place in worker.subnet.parameter_places():
        name = place.name
        if place.chain is not None:
            name = f"{job.chains[place.chain].block_name(held[place.chain][place.slot])}.{name}"
        yield parameter, name


def _integers(worker: Worker) -> list[tuple[str, Tensor]]:
    """The buffers that are counters: they stay with their slot, so they go by the sub-network's own names."""
    return [(n, b) for n, b in worker.subnet.model.named_buffers() if not b.is_floating_point()]


def _room(index: Mapping[str, Any], name: str) -> Tensor:
    stored = index.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise UserError(f"the checkpoint has no tensor {name!r}; it is of another network")
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        key = blake2b(digest_size=16)
        while part := file.read(1 << 22):
            key.update(part)
    return key.hexdigest()


def _digest_of(facts: Mapping[str, object]) -> str:
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line: DCP wraps what each process raised."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error) or type(error).__name__).strip().splitlines()[-1]


class SafeReader(FileSystemReader):
    """DCP's reader, its index read by an unpickler that knows DCP's own classes and torch's sizes and types only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(Path(self.path) / INDEX, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"{self.path}/{INDEX} is not an index of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        ["Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
         "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo"]
    )  # fmt: skip
    _OTHERS = frozenset(
        [("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
         ("pathlib", "PosixPath"), ("pathlib", "Path"), ("pathlib._local", "PosixPath")]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        known = module in self._MODULES and name in self._NAMES
        known |= (module, name) in self._OTHERS
        known |= module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if known:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of the checkpoint names {module}.{name}, which it must not")
