"""Agreement: values that all processes of a job must share, and actions that all of them succeed or fail at."""

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

from resist.errors import AgreedError, UserError
from resist.sync.transport import Transport

T = TypeVar("T")


def check_agreement(transport: Transport, mine: Mapping[str, object]) -> None:
    """Raise AgreedError on every process when two were given different values, naming the first that differs."""
    texts = transport.all_gather_text(json.dumps(mine, default=str))
    first = json.loads(texts[0])
    for process, text in enumerate(texts):
        other = json.loads(text)
        for key in first | other:
            if first.get(key) != other.get(key):
                raise AgreedError(
                    f"process {process} was started with {key}={other.get(key)}, process 0 with {key}={first.get(key)}"
                    "; start all of them with the same arguments"
                )


def run_everywhere(transport: Transport, action: Callable[[], T]) -> T:
    """Do `action` in every process; where it fails for one of them, all raise its error and none waits in vain."""
    result, failure = None, ""
    try:
        result = action()
    except UserError as error:
        failure = str(error)
    for process, text in enumerate(transport.all_gather_text(failure)):
        if text.strip():
            where = f" (process {process})" if transport.num_processes > 1 else ""
            raise AgreedError(text.strip() + where)
    return result  # type: ignore[return-value]  # it is set: no process failed
