"""The command `resist`, also as `python -m resist`.

The imports of the command line take a moment, and an interruption (Ctrl-C) of an import cannot be relied upon: some
modules ignore the exception, others print it. Nothing is under way then that has to be cleaned up, so the process ends.
"""

import _signal as signal  # pyright: ignore[reportMissingImports]  # what signal takes its functions from, in no time
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

STATUS = 130


def main() -> None:
    """Run the command line of this process, and end the process with its exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from resist.cli import main

        main()
    except KeyboardInterrupt:
        _end()
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:  # while the interpreter ends
            signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(STATUS))


def _interrupt(_number: int, frame: "FrameType | None") -> None:
    """Raise KeyboardInterrupt, but end the process where a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    os.write(2, b"resist: interrupted\n")
    os._exit(STATUS)


if __name__ == "__main__":
    main()
