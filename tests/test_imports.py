"""Imports point down only: this parses all of them, and fails where one points up."""

import ast
from pathlib import Path

import pytest

import resist

ROOT = Path(resist.__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))

# What each module of the core may import of the package. Modules that are not named here lie above it, at the edge.
ALLOWED = {
    "errors": set(),
    "plan": {"errors"},
    "schedule": {"plan"},
    "strategy": {"errors", "plan"},
    "residual": set(),
    "facts": set(),
    "chains": {"errors", "facts", "residual"},
    "subnet": {"chains", "errors", "residual"},
    "check": {"chains", "errors", "residual", "subnet"},
    "batchnorm": {"errors"},
    "build": {"errors", "subnet"},
    "fold": {"errors", "strategy", "subnet"},
    "comm": {"comm", "errors", "fold", "schedule"},
    "exchange": {"chains", "comm", "fold", "plan", "schedule", "strategy", "subnet"},
    "worker": {"fold", "subnet"},
    "job": {
        "batchnorm", "build", "chains", "comm", "errors", "exchange", "fold", "plan", "strategy", "subnet", "worker",
    },
    "models": {"errors", "models"},
    "data": {"data", "errors", "plan"},
    "config": {"errors", "strategy"},
    "full": {"chains", "errors", "subnet"},
    "runs": {"config", "errors"},
    "tasks": {"config", "data", "errors", "full", "models", "plan", "runs", "tasks"},
}
NO_TORCH = {"errors", "plan", "schedule", "strategy"}
TOP = ("cli", "__main__")  # imported by nothing else


def imports(file: str) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(file: str) -> str:
    """`job` of job.py, `comm` of comm/ledger.py."""
    return file.removesuffix(".py").split("/")[0]


def rooms(file: str) -> set[str]:
    """The rooms of the package that a file imports from."""
    known = {room(each) for each in FILES}
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("resist.")}
    return ours & known


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in ALLOWED])
def test_the_core_imports_what_lies_below(file: str) -> None:
    assert rooms(file) <= ALLOWED[room(file)]


def test_the_core_is_all_there_and_has_no_cycle() -> None:
    assert set(ALLOWED) <= {room(file) for file in FILES}
    done: set[str] = set()
    while remaining := {name for name in ALLOWED if name not in done}:
        free = {name for name in remaining if ALLOWED[name] - {name} <= done}
        assert free, f"a cycle among {remaining}"
        done |= free


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in NO_TORCH])
def test_decisions_need_no_torch(file: str) -> None:
    assert not {name for name in imports(file) if name.split(".")[0] in ("torch", "torchvision", "numpy")}


@pytest.mark.parametrize("file", FILES)
def test_one_file_talks_to_torch_distributed(file: str) -> None:
    found = {name for name in imports(file) if name.startswith("torch.distributed")}
    if room(file) == "checkpoint":  # the files that torch writes; what processes say to one another is in comm
        found = {name for name in found if not name.startswith("torch.distributed.checkpoint")}
    assert not found or file == "comm/distributed.py"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in TOP])
def test_nothing_imports_the_command_line(file: str) -> None:
    assert not rooms(file) & set(TOP)
