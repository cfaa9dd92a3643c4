"""Tests of what is distributed: wheel, sdist, metadata, and the tools that contributors and forges run."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import resist

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Programs whose distribution has another name.
PROVIDED_BY = {"mkdocs": "mkdocs-material", **dict.fromkeys(
    ("trailing-whitespace-fixer", "end-of-file-fixer", "check-merge-conflict", "check-added-large-files", "check-toml",
     "check-yaml"), "pre-commit-hooks")}  # fmt: skip
NOT_TOOLS = {"pip", "venv", "resist", "python", "make", "cd", "."}  # Python's own, ours, and the shell's


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist."""
    for package in ("build", "hatchling"):
        pytest.importorskip(package, reason="needs pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], cwd=folder)
    return folder


def call(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_sdist_is_complete(dist: Path) -> None:
    (file,) = dist.glob("*.tar.gz")
    stem = f"torch_resist-{resist.__version__}"
    assert file.name == f"{stem}.tar.gz"
    with tarfile.open(file) as archive:
        names = {name.removeprefix(f"{stem}/") for name in archive.getnames()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.py")}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    others = {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci/run", "src/resist/py.typed"}
    assert modules | tests | others <= names
    assert not [name for name in names if re.search(r"(^|/)(\.venv|\.git|__pycache__|runs|data)/", f"{name}/")
                and not name.startswith(("src/", "tests/"))]  # fmt: skip


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_metadata(dist: Path) -> None:
    (file,) = dist.glob("*.whl")
    assert file.name == f"torch_resist-{resist.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    info = metadata.removesuffix("METADATA")
    package = {name for name in names if not name.startswith(info)}
    source = {p for p in (ROOT / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert package == {str(path.relative_to(ROOT / "src")) for path in source}
    assert {"resist/py.typed", f"{info}licenses/LICENSE", f"{info}entry_points.txt"} <= names
    assert (fields["Name"], fields["Version"]) == ("torch-resist", resist.__version__)
    assert (fields["License-Expression"], fields["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "Typing :: Typed" in fields.get_all("Classifier", [])
    assert fields.get_payload().startswith("# resist")  # type: ignore[union-attr]


@pytest.mark.nightly  # the forge runs the wheel in an empty environment for each change
def test_the_installed_wheel_runs(dist: Path, tmp_path: Path) -> None:
    """Install it next to torch, in a repository of the user, and run it outside the source tree."""
    (file,) = dist.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    call(["git", "init", "--quiet", str(tmp_path)], work)
    identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    call(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "of the user"], work)
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(site)]
    call([sys.executable, "-m", "pip", "install", *options, str(file)], work)
    path = str(site)
    where = call([sys.executable, "-c", "import resist.cli; print(resist.cli.__file__)"], work, PYTHONPATH=path)
    assert Path(where.strip()).is_relative_to(site)
    commit = call([sys.executable, "-c", "from resist.runs.directory import _commit; print(_commit())"], work,
                  PYTHONPATH=path)  # fmt: skip
    assert commit == "None\n"  # that of the user is not the package's
    program = str(site / "bin" / "resist")
    assert call([program, "--version"], work, PYTHONPATH=path) == f"resist {resist.__version__}\n"
    plan = call([program, "plan", "--workers", "3", "--min-depth", "0"], work, PYTHONPATH=path)
    assert "Which worker holds which block of layer3:1-8" in plan
    assert list(work.iterdir()) == []


def test_the_version_is_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.search(rf"^## \[Unreleased\]\n\n.*\b{re.escape(resist.__version__)}\b|^## \[{resist.__version__}\]",
                     (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)  # fmt: skip


def test_the_annotations_are_for_users_too() -> None:
    assert (Path(resist.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("folder", ["src", "docs"])
def test_extras_are_named_with_the_distribution(folder: str) -> None:
    named: set[str] = set()
    for file in (ROOT / folder).rglob("*"):
        if file.suffix in (".py", ".md"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"pip install '?resist\b", text), file
            named |= set(re.findall(r"pip install '?torch-resist\[(\w+)\]", text))
    assert named
    assert named <= set(EXTRAS)


def distributions(extra: str) -> set[str]:
    """Return the names of the distributions of an extra, with those of the extras that it includes."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        name, inner = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?.*", requirement).groups()  # type: ignore[union-attr]
        names |= set().union(*map(distributions, inner.split(","))) if name == PROJECT["name"] else {name}
    return names


def steps(file: Path) -> list[str]:
    """Return the lines of the shell scripts of a workflow."""
    jobs: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return [line for run in runs for line in run.splitlines()]


def program(line: str) -> str:
    """Return the program of a command; of `python -m NAME`, the name."""
    words = line.split()
    name = words[0].rpartition("/")[2] if words[0] != "." else "."
    return words[2] if name == "python" and words[1:2] == ["-m"] else name


def test_all_tools_are_in_the_extra_dev() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {repository["repo"] for repository in hooks} == {"local"}  # nothing is fetched from a forge
    lines = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    lines += steps(ROOT / ".github/workflows/tests.yml")
    lines += re.findall(r"\$\(BIN\)/(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    tools = {program(line) for line in lines} - NOT_TOOLS
    assert {"ruff", "pytest", "pyright", "build", "pre-commit", "mkdocs"} <= tools
    assert {PROVIDED_BY.get(tool, tool) for tool in tools} <= distributions("dev")


def test_the_workflow_has_the_supported_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    listed = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert matrix["python"] == listed
    assert PROJECT["requires-python"] == f">={listed[0]}"
    (torch,) = (requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch>="))
    assert [entry["torch"] for entry in matrix["include"]] == [torch.removeprefix("torch>=")]
