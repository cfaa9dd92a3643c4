"""A run directory as it is written: its files, and the process that writes them.

config.json        the configuration
environment.json   versions, commit, hardware, start; "resumed": those of the last resumption; "missing_rounds": rounds
                   whose records were lost with the process that would have written them, as [first, last]
metrics.jsonl      one line for each round (see `Run.append`)
state.json         the state of the run (see `Run.state`)
checkpoints/       the states to resume from, see `resist.runs.checkpoint`
evaluation.json    the full network read in several ways, by `resist.training.evaluate`
model.safetensors  the full network at the end, see `resist.runs.model_file`
lock               the process that writes into the directory, while there is one, see `resist.runs.lock`

`resist.runs.history` reads these files.
"""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from pathlib import Path

from resist.errors import UserError
from resist.runs.atomic import write_atomically
from resist.runs.config import MethodConfig, TrainConfig
from resist.runs.history import missing_rounds, read_past, read_table
from resist.runs.lock import RunLock
from resist.runs.records import Record

# Environment variable: the command line of the launcher, as JSON, for the processes that it starts.
COMMAND = "RESIST_COMMAND"
INSIDE = 128  # bytes that the path of a file in the run directory may be longer than that of the directory
SEEN_S = 5.0  # how long a file that another machine wrote may take to appear


def default_out(config: TrainConfig) -> Path:
    """Return the default run directory, runs/DATE-TIME-DATA-STRATEGY."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{now}-{config.network.data}-{config.method.strategy}"


def title_of(config: TrainConfig) -> str:
    """A short title: data, model, strategy, number of workers, and the wire if it is not the default."""
    network, method = config.network, config.method
    wire = f", {method.wire_text}" if method.wire_text != MethodConfig().wire_text else ""
    workers = f"{method.workers} worker{'s' * (method.workers > 1)}"
    return f"{network.data}, {network.model}, {method.strategy}, {workers}{wire}"


def check_free(path: Path) -> None:
    """Raise UserError where a new run directory cannot be created at `path`."""
    try:
        if path.exists() or path.is_symlink():
            raise UserError(
                f"`out={path}` exists already and is never overwritten; give another directory, or remove it"
            )
        parent = next(p for p in path.absolute().parents if p.exists())
        length, most = len(os.fsencode(path.absolute())), os.pathconf(parent, "PC_PATH_MAX") - INSIDE
        if length > most:
            raise UserError(f"`out` has a path of {length} bytes, more than {most}; give a shorter one")
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise UserError(f"`out={path}` cannot be made: {error.strerror}; give another directory") from error
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))  # only a trial shows it: file systems refuse even those who may write
    except OSError as error:
        raise UserError(
            f"`out={path}` cannot be made: {parent} is not a directory that you may write to ({error.strerror})"
        ) from error


def check_resumable(path: Path, config: TrainConfig) -> None:
    """Raise UserError where a run would begin at its first step again, and lose what it has done.

    One that was ended before its first checkpoint may begin again.

    Args:
        path: The run directory.
        config: Its configuration.
    """
    if any(path.glob("checkpoints/round-*")) or any(path.glob("replicas/round-*")):
        return
    try:
        rounds = (path / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        rounds = None
    done = f"{rounds} round{'s' * (rounds != 1)}"
    state = read_table(path / "state.json", []).get("state")
    if rounds is None:
        found = "has neither a checkpoint to continue from nor a metrics.jsonl"
    elif (path / "model.safetensors").exists() or state == "finished":
        found = f"has ended after {done}, and has no checkpoint to continue from"
    elif state == "interrupted" or rounds > 2 * config.run.checkpoint_rounds:
        found = f"has the records of {done}, but no checkpoint to continue from"
    else:
        return
    raise UserError(f"{path} {found}; copy one into {path / 'checkpoints'}, or train again with another `out`")


def mark(path: Path) -> str:
    """A digest that distinguishes this run directory from others of the same name; "" where there is none."""
    try:
        return blake2b((path / "environment.json").read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def seen_after_a_while(path: Path, expected: str) -> bool:
    """Wait some seconds for the run directory with the mark `expected`: network file systems are slow.

    Returns:
        True where this process sees it.
    """
    end = time.monotonic() + SEEN_S
    while not (seen := mark(path) == expected) and time.monotonic() < end:
        time.sleep(0.2)
    return seen


class Run:
    """A run directory that is being written. Only one process of a job has one.

    Args:
        path: the directory. It must not exist yet, except where the run resumes.
        config: the configuration of the run.
        resume_round: the round after which an existing run resumes; records of later rounds are dropped.
        lock: the lock of the directory; it is taken as soon as the directory exists. Default: there is none.
        next_round: the next round that will have a record here. Default: the one after `resume_round`.

    Attributes:
        past: the records of the rounds up to `resume_round`.

    Raises:
        UserError: the directory cannot be written, another process has its lock, or a file of the run that resumes is
            damaged.
    """

    def __init__(
        self, path: Path, config: TrainConfig, resume_round: int | None = None, lock: RunLock | None = None,
        next_round: int | None = None,
    ) -> None:  # fmt: skip
        self.path, self._lock, self.past, lines = path, lock, list[Record](), list[bytes]()
        if resume_round is None:
            check_free(path)
        metadata: dict[str, object] = environment()
        if resume_round is not None:
            earlier = read_table(path / "environment.json")
            past = read_past(path, resume_round, earlier.pop("missing_rounds", None))
            lines, self.past = [line + b"\n" for line, _ in past], [record for _, record in past]
            metadata = {**earlier, "resumed": metadata} if earlier else metadata
            # A process can be lost after a round and before its record: replicas of that round are newer.
            following = resume_round + 1 if next_round is None else next_round
            missing = missing_rounds([*(record["round"] for record in self.past), following])
            metadata |= {"missing_rounds": missing} if missing else {}
        try:
            path.mkdir(parents=True, exist_ok=resume_round is not None)
            if lock is not None:
                lock.acquire()
            self._write_json("environment.json", metadata)
            write_atomically(path / "metrics.jsonl", b"".join(lines))
            self._write_json("config.json", config.to_json())  # the last one: with it there is a run to resume
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"`out={path}` cannot be written: {error.strerror}; give another directory") from error

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line to metrics.jsonl, which other processes can read at once.

        Args:
            record: the round's numbers, ready for JSON; `resist.runs.records.clean` lists the keys.

        Raises:
            UserError: the line cannot be written, or another process has taken the directory over.
        """
        if taken := self.taken_over():
            raise UserError(taken)
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"{self.path / 'metrics.jsonl'} cannot be written: {error.strerror}; make room") from error

    def amend(self, values: Mapping[str, object]) -> None:
        """Replace values of the last line of metrics.jsonl.

        Args:
            values: by key, as in `append`.

        Raises:
            UserError: as in `append`.
        """
        if taken := self.taken_over():
            raise UserError(taken)
        file = self.path / "metrics.jsonl"
        try:
            *lines, last = file.read_bytes().splitlines(keepends=True)
            amended = json.dumps({**json.loads(last), **values}) + "\n"
            write_atomically(file, b"".join([*lines, amended.encode()]))
            self._metrics.close()
            self._metrics = file.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}; make room") from error

    def rewrite(self, config: TrainConfig) -> None:
        """Replace config.json by options that were chosen during the run.

        Raises:
            UserError: It cannot be written, or another process has taken the directory over.
        """
        if taken := self.taken_over():
            raise UserError(taken)
        try:
            self._write_json("config.json", config.to_json())
        except OSError as error:
            raise UserError(f"{self.path / 'config.json'} cannot be written: {error.strerror}; make room") from error

    def taken_over(self) -> str | None:
        """Return a message where another process has taken the directory over, as while this machine slept."""
        try:
            if self._lock is not None:
                self._lock.check()
        except UserError as error:
            return str(error)
        return None

    def state(self, state: str, rounds: int, error: str = "", *, closing_s: float = 0.0) -> None:
        """Write state.json, if the directory is still that of this process.

        On a full disk the file stays as it was: that must not end the run.

        Args:
            state: "running", "finished", "interrupted" or "failed".
            rounds: the number of rounds that the run will have.
            error: the reason of a failure.
            closing_s: seconds from the last record to the end of the run, for the last checkpoint.
        """
        if self.taken_over():
            return
        content = {
            "state": state, "rounds": rounds, "error": error, "closing_s": closing_s,
            "host": socket.gethostname(), "process": os.getpid(),
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self._write_json("state.json", content)

    def close(self) -> None:
        """Close metrics.jsonl. `append` has raised for what could not be written."""
        with contextlib.suppress(OSError):
            self._metrics.close()

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")


def environment() -> dict[str, object]:
    """Versions, commit and hardware, ready for JSON."""
    import torch  # here, so that reports, which share this module, do not need it

    import resist

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(),
        "resist": resist.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def command() -> list[str]:
    """The command line of this process, or of the launcher that has started it."""
    given = os.environ.get(COMMAND)
    if given:
        return json.loads(given)
    name = Path(sys.argv[0]).name
    return ["resist" if name == "__main__.py" else name, *sys.argv[1:]]  # python -m resist


def _commit() -> str | None:
    """The git commit of this package's source, or None where it is not a checkout."""
    tracked = ["git", "ls-files", "--error-unmatch", __file__]  # not where it is installed inside another repository
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        for arguments in (tracked, describe):
            done = subprocess.run(arguments, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            if done.returncode != 0:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def processor() -> str:
    """The name of the processor, as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
