"""`--compile` without a compiler, or with one that fails: one line before anything is made."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resist.cli import main
from resist.errors import UserError
from resist.training.compiler import check_compiler

FAILS = """#!/bin/sh
case "$*" in *--version*) echo "g++ (GCC) 12.2.0"; exit 0;; esac
echo "try.cpp:1: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on any Python but 3.13.0, where torch's may be refused."""
    monkeypatch.setattr("resist.training.compiler.missed_changes", lambda: "")


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Path]:
    """The only compiler, which does not exist yet."""
    from torch._inductor import config, cpp_builder

    path = tmp_path / "g++"
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": (None, str(path))}):
        yield path
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.slow  # torch imports its compiler
def test_without_a_compiler_nothing_is_made(compiler: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", "--compile", "--device", "cpu", "--processes", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    expected = f"resist: --compile needs a C++ compiler on this host ({compiler}); leave it out\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_with_its_reason(compiler: Path) -> None:
    compiler.write_text(FAILS)
    compiler.chmod(0o755)
    with pytest.raises(UserError) as caught:
        check_compiler(torch.device("cpu"))
    assert str(caught.value) == (
        f"`compile`: the C++ compiler {compiler} fails (try.cpp:1: fatal error: Python.h: No such file or directory); "
        "repair it, or leave `compile` out"
    )


@pytest.mark.slow
def test_the_compiler_of_this_machine_works() -> None:
    check_compiler(torch.device("cpu"))


def test_a_gpu_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="needs a C compiler on this host"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setenv("CC", "cc")
    check_compiler(torch.device("cuda"))


def test_a_torch_that_misses_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resist.training.compiler.missed_changes", lambda: "it misses them; take another")
    with pytest.raises(UserError, match="`compile`: it misses them; take another"):
        check_compiler(torch.device("cuda"))


def test_a_torch_with_other_private_names_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.cpp_builder", None)
    check_compiler(torch.device("cpu"))
