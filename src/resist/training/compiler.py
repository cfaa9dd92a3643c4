"""A test of the compiler that torch.compile needs, before any process starts and anything is written."""

import importlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from resist.blocks.compiling import missed_changes
from resist.errors import UserError

# What the sources that torch.compile makes include, too.
SOURCE = '#include <Python.h>\n#include <cmath>\nextern "C" double one() { return std::cos(0.0); }\n'


def check_compiler(device: torch.device) -> None:
    """Compile a small program as torch.compile does.

    Args:
        device: The device that a network is to be compiled for.

    Raises:
        UserError: There is no compiler, it does not work, or compiled networks do not notice changes here.
    """
    importlib.import_module("torch._dynamo")  # its settings

    if missed := missed_changes():
        raise UserError(f"`compile`: {missed}")
    if device.type == "cuda":  # Triton's kernels are started by functions in C
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise UserError("`compile` needs a C compiler on this host (gcc, or the one that CC names); leave it out")
        return
    try:
        from torch._inductor import config
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # private names, which another version of torch may not have: the first step finds out
        return
    names = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else [config.cpp.cxx]
    compiler = ", ".join(str(name) for name in names if name) or "CXX is empty"
    with tempfile.TemporaryDirectory(prefix="resist-") as folder:
        source = Path(folder) / "try.cpp"
        source.write_text(SOURCE)
        try:
            CppBuilder("try", str(source), CppTorchOptions(warning_all=False), folder).build()
        except (InvalidCxxCompiler, OSError) as error:  # not found, or not to be executed
            raise UserError(f"`compile` needs a C++ compiler on this host ({compiler}); leave it out") from error
        except RuntimeError as error:
            raise UserError(
                f"`compile`: the C++ compiler {compiler} fails ({_reason(error)}); repair it, or leave `compile` out"
            ) from error


def _reason(error: Exception) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    output = str(error).partition("Output:\n")[2] or str(error)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next(iter([line for line in lines if "error" in line.lower()] or lines), "without a message")
    return line if len(line) <= 120 else f"{line[:117]}..."
