"""Tests of the documents: commands parse and run; links, names, imports and quoted messages exist."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from resist import cli
from resist.cli.compare import CompareConfig
from resist.cli.options import as_typed, config_keys, options_of
from resist.runs.config import TrainConfig
from test_imports import ALLOWED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(DOCS.glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Commands that are neither run nor parsed here, by their beginning, with the reason.
NOT_RUN = {
    "export ": "sets names in a shell",
    ". .venv/bin/activate": "needs the environment that make creates",
    "sudo ufw ": "changes a firewall",
    'python -c "import secrets': "makes a secret",
}
# Commands of the README and the first page that are run: at this size, in one process, in a temporary folder.
SMALL = [
    "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32", "--local-steps", "2", "--epochs", "0.1",
    "--num-evals", "1", "--batchnorm", "average", "--device", "cpu",
]  # fmt: skip
RUN = {"train": [*SMALL, "--processes", "1"], "compare": [*SMALL, "--processes", "1"], "plan": [], "evaluate": [],
       "export": [], "report": ["--force"], "watch": ["--no-progress"]}  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, also indented ones."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(page: Path) -> list[str]:
    """Return the commands of a page, each as one line.

    These are all lines of blocks marked sh, and lines of other blocks that begin like a command of ours.
    """
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    rest = re.sub(r"^ *```\w+\n.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    rest = rest.replace("\\\n", " ")
    return found + re.findall(r"^(?:    )?((?:resist [a-z]+ |torchrun |python ).*)$", rest, re.M)


ALL = [pytest.param(command, id=f"{page.stem}: {command[:50]}") for page in PAGES for command in commands(page)]


def parse_resist(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse arguments with the real parser and validate them, without running the command."""
    seen: list[Any] = []

    def look(config: Any, _given: frozenset[str]) -> int:
        if isinstance(config, TrainConfig):
            config.check()
        if isinstance(config, CompareConfig):
            for run_config in config.runs(Path("x")):
                run_config.check()
        seen.append(config)
        return 0

    monkeypatch.setattr(cli, "COMMANDS", {name: (kind, look) for name, (kind, _) in cli.COMMANDS.items()})
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0, arguments
    return seen[0]


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = get_args_parser().parse_args(words)
    if options.module:
        assert options.training_script == "resist"
        parse_resist(options.training_script_args, monkeypatch)
    else:
        assert options.training_script == "mine.py" or (ROOT / options.training_script).is_file()


@pytest.mark.parametrize("command", ALL)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith(tuple(NOT_RUN)):
        return
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    name, rest = words[0], words[1:]
    if name == "resist":
        parse_resist(rest, monkeypatch)
    elif name == "torchrun":
        check_torchrun(rest, monkeypatch)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[:2] == ["install", "-e"]
        assert set(re.findall(r"\w+", rest[2].partition("[")[2])) <= set(extras)
    elif name == "python":
        assert (ROOT / rest[0]).is_file()  # examples, which test_examples runs
    elif name == "sbatch":
        script = rest.index("slurm.sbatch")
        assert all(option.startswith("--") and "=" in option for option in rest[:script])
        parse_resist(["train", *rest[script + 1 :]], monkeypatch)
    elif name.startswith("./"):
        assert (DOCS / "files" / name[2:]).is_file()
    else:
        pytest.fail(f"{command!r} is not tested; add it here, or to NOT_RUN with the reason")


def test_commands_that_are_not_run_are_in_the_documents() -> None:
    everything = [command for page in PAGES for command in commands(page)]
    assert len(everything) > 30
    assert [begin for begin in NOT_RUN if not any(command.startswith(begin) for command in everything)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/index.md", marks=pytest.mark.nightly)])
def test_the_first_steps_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the commands in the order of the page, each after the ones before it."""
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []
    for command in commands(ROOT / page):
        words = shlex.split(command, comments=True)
        if words[0] != "resist" or words[1] not in RUN or "cifar" in command or "imagenet" in command:
            continue
        if "--resume" in words:  # the run is complete, and the command says so
            assert run_resist(words[1:]) == 0
            continue
        assert run_resist([*words[1:], *RUN[words[1]]]) == 0, command
        ran.append(words[1])
    assert {"train", "evaluate", "plan", "report"} <= set(ran)
    assert list(tmp_path.glob("runs/*/model.safetensors"))


def run_resist(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_python_of_the_library_page_runs() -> None:
    """Run one snippet after the other, as the page says."""
    namespace: dict[str, Any] = {"__name__": "library"}
    snippets = blocks(DOCS / "library.md", "python")
    assert len(snippets) > 6
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"library.md, snippet {number}", "exec"), namespace)


@pytest.mark.parametrize("name", NAMES)
def test_python_elsewhere_is_python(name: str) -> None:
    for snippet in blocks(ROOT / name, "python"):
        ast.parse(snippet)


def slug(heading: str) -> str:
    """Return the anchor of a heading, where GitHub and MkDocs agree."""
    plain = re.sub(r"[`*_]|\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain))


@cache
def anchors(page: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("name", NAMES)
def test_links_exist(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if page.parent == DOCS:
            assert file.is_relative_to(DOCS), f"{target} is not part of the site"
        if anchor:
            assert anchor in anchors(file), target


def dotted_names() -> Iterator[str]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from re.findall(r"`(resist(?:\.\w+)+)(?:\(.*?\))?`", text)
        yield from re.findall(r"^::: (\S+)$", text, re.M)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("resist.integrations") else ())  # large imports
        for name in sorted(set(dotted_names()))
    ],
)
def test_named_functions_exist(name: str) -> None:
    for library in ("lightning", "transformers"):
        if name.startswith(f"resist.integrations.{library}"):
            pytest.importorskip(library)
    resolve(name)


def resolve(name: str) -> Any:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is not there")


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|tests|benchmarks|examples|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_text_exist(name: str) -> None:
    """`--option` in running text is an option of a command, or of another program that is listed here."""
    others = {"--nproc-per-node", "--nnodes", "--node-rank", "--max-restarts", "--help", "--version", "--master-addr"}
    others |= {"--signals-to-handle", "--signal", "--requeue", "--cpus-per-task"}
    known: set[str] = set(others)
    for kind, _ in cli.COMMANDS.values():
        known |= {flag for option in options_of(kind).values() for flag in option.flags}
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    if Path(name).name in ("results.md", "LOG.md"):
        return  # dated: they keep the options of that time
    for option in re.findall(r"`[^`]*?(--[a-z][\w-]*)", text):
        assert option in known, option


def test_the_keys_that_are_not_options_are_in_the_documents() -> None:
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.M)
    assert listed == config_keys(TrainConfig)


def test_the_imports_of_the_architecture_page_are_the_rule() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.M)
    listed = {room: set(re.findall(r"`(\w+)`", rooms)) for room, rooms in rows}
    listed["cli"] = set(listed) - listed["cli"] - {"cli"}  # "all rooms above except"
    assert listed == {room: rooms for room, rooms in ALLOWED.items() if room in listed}
    assert set(ALLOWED) - set(listed) == {"errors", "__main__", "__init__"}


@cache
def templates() -> tuple[list[str], ...]:
    """Return every text of the source as its literal parts, without the values that are filled in."""
    found: list[list[str]] = []

    def typed(parts: list[str]) -> list[str]:  # options as the command line writes them
        return as_typed("VALUE".join(parts)).replace("`", "").split("VALUE")

    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [""]
                for value in node.values:
                    if isinstance(value, ast.Constant):
                        parts[-1] += str(value.value)
                    else:
                        parts.append("")
                found.append(typed(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(typed([node.value]))
    return tuple(parts for parts in found if sum(map(len, parts)) >= 12)


def share_in_source(message: str) -> float:
    """Return the share of a message that is literally in matching texts of the source."""
    covered = [False] * len(message)
    for parts in templates():
        if not all(part in message for part in parts):  # a search takes a hundred times as long
            continue
        found = re.search(".*?".join(f"({re.escape(part)})" for part in parts), message)
        for group in range(1, len(parts) + 1 if found else 0):
            assert found is not None
            covered[found.start(group) : found.end(group)] = [True] * (found.end(group) - found.start(group))
    return sum(covered) / len(message)


MESSAGES = [line for block in blocks(DOCS / "troubleshooting.md", "text") for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_those_of_the_source(message: str) -> None:
    assert share_in_source(message) > 0.4, message


@pytest.mark.slow
def test_an_invented_message_is_detected() -> None:
    assert len(MESSAGES) > 20
    assert share_in_source("--batch-size 7 may not be odd; take an even number of images instead") < 0.3


@pytest.mark.nightly  # by day other tests look at links and names; the forge builds the site for each change
def test_the_site_builds(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for name in ("resist.Job.step", "resist.partition", "resist.cost.predict"):
        assert f'id="{name}"' in reference, name
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not fetched, f"{page} needs a network: {fetched}"
    for file in (DOCS / "files").iterdir():
        assert (tmp_path / "site/files" / file.name).read_bytes() == file.read_bytes()
