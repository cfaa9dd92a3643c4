"""Imports point down only: one rule for each room, in the order of the rooms. A file that imports upward fails here."""

import ast
from functools import cache
from pathlib import Path

import resist

ROOT = Path(resist.__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))

# What the files of each room may import of the package, the lowest room first. `errors` may be imported everywhere.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "planning": set(),
    "blocks": {"planning"},
    "subnet": {"planning", "blocks"},
    "checking": {"blocks", "subnet"},
    "sync": {"planning", "blocks", "subnet"},
    "state": {"planning", "blocks", "subnet", "sync"},
    "members": {"planning", "sync"},
    "job": {"planning", "blocks", "subnet", "checking", "sync", "state", "members"},
    "runs": {"planning", "blocks", "subnet", "sync", "state", "job"},
    "models": set(),
    "data": {"planning"},
    "tasks": {"planning", "blocks", "subnet", "checking", "runs", "models", "data"},
    "cost": {"planning", "blocks", "subnet", "checking", "sync", "runs", "tasks", "report"},
    "report": {"planning", "runs"},
    "export": {"planning", "blocks", "subnet", "job", "runs", "models", "data", "tasks"},
    "integrations": {"subnet", "job", "export"},
    "training": {
        "planning", "blocks", "subnet", "sync", "members", "job", "runs", "models", "data", "tasks", "cost", "report",
    },
    "cli": {
        "planning", "blocks", "sync", "members", "job", "runs", "models", "data", "tasks", "cost", "report", "export",
        "training",
    },
    "__main__": {"cli"},
    "__init__": {"planning", "blocks", "subnet", "checking", "sync", "job", "runs", "report"},
}  # fmt: skip
NO_TORCH = ("errors.py", "planning/", "report/", "runs/history.py", "runs/records.py", "runs/follower.py")
LARGE = {"torch", "torchvision", "numpy", "matplotlib"}
MATPLOTLIB = {"report/png.py"}
TORCH_DISTRIBUTED = {
    "sync/distributed.py",
    "members/generations.py",
    "sync/groups.py",
    "sync/meeting.py",
    "sync/process_group.py",
    "members/store_client.py",
}


@cache
def imports(file: str) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` counts as a and a.b, as does `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def room(file: str) -> str:
    """`job` of job.py, `sync` of sync/traffic.py."""
    return file.removesuffix(".py").split("/")[0]


def rooms(file: str) -> set[str]:
    """The rooms of the package that a file imports from."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("resist.")}
    names |= {getattr(resist, name).__module__.split(".")[1] for name in names & set(resist.__all__)}
    return names & ALLOWED.keys()


def test_imports_point_down() -> None:
    upward = {file: rooms(file) - ALLOWED[room(file)] - {"errors", room(file)} for file in FILES}
    assert {file: names for file, names in upward.items() if names} == {}


def test_every_room_has_a_rule_and_none_is_below_itself() -> None:
    assert set(ALLOWED) == {room(file) for file in FILES}
    done: set[str] = set()
    while remaining := {name for name in ALLOWED if name not in done}:
        free = {name for name in remaining if ALLOWED[name] <= done}
        assert free, f"a cycle among {remaining}"
        done |= free


def test_planning_and_reports_need_no_torch() -> None:
    files = {file for file in FILES if file.startswith(NO_TORCH)} - MATPLOTLIB
    assert files
    large = {file: {name.split(".")[0] for name in imports(file)} & LARGE for file in files}
    assert {file: names for file, names in large.items() if names} == {}


def test_few_files_call_torch_distributed() -> None:
    found = {file for file in FILES if any(name.startswith("torch.distributed") for name in imports(file))}
    assert found == TORCH_DISTRIBUTED
