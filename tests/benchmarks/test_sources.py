"""The source files that a line of the results names: judged by their contents, in a clone without history too."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import provenance
import sources

FILES = {"src/a/one.py": b"1\n", "src/a/b/two.py": b"2\n", "src/ab.py": b"3\n"}


@pytest.mark.parametrize("benchmark", sources.SOURCES)
def test_every_path_is_here(benchmark: str) -> None:
    for path in sources.SOURCES[benchmark]:
        assert any(name == path or name.startswith(f"{path}/") for name in sources.here()), path
    assert sources.changed(provenance.provenance(benchmark)) == []


def test_a_hash_is_that_of_the_contents() -> None:
    before = sources.hashes(["src/a", "src/ab.py"], FILES)
    assert before == sources.hashes(["src/a", "src/ab.py"], FILES | {"src/a/one.py": b"1\r\n"})
    for change, path in (({"src/a/b/two.py": b"4\n"}, "src/a"), ({"src/ab.py": b""}, "src/ab.py")):
        after = sources.hashes(["src/a", "src/ab.py"], FILES | change)
        assert [name for name in before if before[name] != after[name]] == [path]
    renamed = {"src/a/three.py": FILES["src/a/one.py"], "src/a/b/two.py": FILES["src/a/b/two.py"]}
    assert sources.hashes(["src/a"], renamed)["src/a"] != before["src/a"]


def test_a_line_without_files_is_unknown_and_a_path_that_is_gone_has_changed() -> None:
    assert sources.changed({}) is None
    assert sources.changed({"sources": sources.hashes(["src/resist/gone.py"], {"src/resist/gone.py": b""})}) == [
        "src/resist/gone.py"
    ]


def test_older_lines_get_the_hashes_of_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("git"):
        pytest.skip("needs git")

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    results, code = tmp_path / "benchmarks" / "results", tmp_path / "benchmarks" / "memory.py"
    results.mkdir(parents=True)
    code.write_text("old\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "--short", "HEAD").strip()
    code.write_text("new\n")
    lines = [{"benchmark": "memory", "commit": name} for name in (f"{commit}-dirty", "0000000")]
    (results / "memory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "RESULTS", results)
    monkeypatch.setattr(sources, "here", lambda: {"benchmarks/memory.py": code.read_bytes()})
    sources.main()
    first, second = (json.loads(line) for line in (results / "memory.jsonl").read_text().splitlines())
    assert second == lines[1]
    assert sources.changed(first) == ["benchmarks/memory.py"]
    code.write_text("old\n")
    assert sources.changed(first) == []
