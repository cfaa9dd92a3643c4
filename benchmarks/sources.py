"""The source files that each benchmark measures, and which of them have changed since.

    python benchmarks/sources.py        # gives lines of benchmarks/results/ that lack it the hashes of their commit

A line has `sources`: path of a file, or of a folder with Python files -> hash of the contents. Lines are judged by
these hashes alone, which needs no history. Comments count, too: code that is not the same is not the code that was
measured. A line that names a commit with changes that were not committed gets the hashes of the commit.
"""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUND = ("src/resist/job.py", "src/resist/planning", "src/resist/subnet", "src/resist/sync")  # of training and exchange
NETWORK = "src/resist/models/preact_cifar.py"
TRAINED = (*ROUND, "src/resist/data", "src/resist/models", "src/resist/tasks", "src/resist/training")
WIRE = ("benchmarks/wire.py", "benchmarks/wire_steps.py", "benchmarks/namespaces.py", "benchmarks/competitors.py",
        "benchmarks/own.py", *ROUND, NETWORK)  # fmt: skip
SOURCES: dict[str, Sequence[str]] = {
    "accuracy": ("benchmarks/cifar10.py", "benchmarks/cifar10_rows.py", *ROUND, "src/resist/data", NETWORK),
    "checkpoints": ("benchmarks/checkpoints.py", "src/resist/runs", "src/resist/state", *ROUND),
    "cifar10": ("benchmarks/cifar10.py", *ROUND, "src/resist/data", NETWORK),
    "detection": ("benchmarks/detection.py", *TRAINED),
    "elastic": ("benchmarks/elastic.py", "benchmarks/elastic_members.py", "benchmarks/elastic_figures.py",
                "src/resist/members", *ROUND, NETWORK),
    "elastic_accuracy": ("benchmarks/elastic_accuracy.py", "src/resist/members", *TRAINED),
    "exchange": ("benchmarks/exchange.py", "benchmarks/competitors.py", "benchmarks/own.py", *ROUND, NETWORK),
    "formats": WIRE,
    "faults": ("benchmarks/faults.py", "tests/faults", "src/resist/runs", "src/resist/state", *ROUND,
               "src/resist/training"),
    "imagenet": ("benchmarks/imagenet.py", *TRAINED),
    "memory": ("benchmarks/memory.py", "benchmarks/competitors.py", "benchmarks/own.py", *ROUND, NETWORK),
    "recording": ("benchmarks/recording.py", "src/resist/runs", "src/resist/training"),
    "wire": WIRE,
}  # fmt: skip


def main() -> None:
    for file in sorted(RESULTS.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        lacking = [line for line in lines if "sources" not in line and line.get("benchmark") in SOURCES]
        for line in lacking:
            files = committed(line["commit"].removesuffix("-dirty"))
            if files:  # paths that were there
                line["sources"] = hashes([path for path in SOURCES[line["benchmark"]] if _below(path, files)], files)
        filled = sum("sources" in line for line in lacking)
        if filled:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if lacking:
            print(f"{file.name}: {filled} of {len(lacking)} lines without sources have a commit that is known here")


def hashes(paths: Sequence[str], files: Mapping[str, bytes] | None = None) -> dict[str, str]:
    """Return the hash of each path: of the contents of its file, or of all Python files below it.

    Args:
        paths: Paths in the repository.
        files: Path in the repository -> contents. Default: the files that are here.
    """
    files = here() if files is None else files
    found: dict[str, str] = {}
    for path in paths:
        digest = hashlib.sha256()
        for name in _below(path, files):
            contents = files[name].replace(b"\r\n", b"\n")
            digest.update(f"{name}\0{len(contents)}\0".encode() + contents)
        found[path] = digest.hexdigest()[:12]
    return found


def changed(record: Mapping[str, Any]) -> list[str] | None:
    """Return the paths that a line names and whose contents are others now; None if it names none."""
    named: dict[str, str] | None = record.get("sources")
    if named is None:
        return None
    now = hashes(list(named))
    return [path for path, value in named.items() if now[path] != value]


def _below(path: str, files: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in files if name == path or name.startswith(f"{path}/"))


@cache
def here() -> dict[str, bytes]:
    """Return the Python files of the rooms that are measured."""
    files = (file for room in ("src", "benchmarks", "tests") for file in (ROOT / room).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


@cache
def committed(commit: str) -> dict[str, bytes]:
    """Return the Python files of a commit; none if it is not known here."""
    command = ["git", "archive", "--format=tar", commit]
    try:
        archived = subprocess.run(command, cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        return {}
    if archived.returncode:
        return {}
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as tar:
        members = [member for member in tar if member.isfile() and member.name.endswith(".py")]
        opened = {member.name: tar.extractfile(member) for member in members}
        return {name: file.read() for name, file in opened.items() if file is not None}


if __name__ == "__main__":
    main()
