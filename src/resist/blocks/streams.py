"""Streams: where a block takes its hidden state, and where it returns it.

By default the hidden state is the first positional argument, or without any the first tensor among the keyword
arguments, and the first item of what the block returns. A `Stream` names other places.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

from torch import Tensor

Path = tuple[int | str, ...]  # of a tensor in nested tuples, lists, mappings and dataclasses; () is the value itself


@dataclass(frozen=True)
class Stream:
    """Places of the hidden state.

    Attributes:
        source: Its place among the arguments: (0,) is the first positional one, ("x",) the keyword argument x.
        target: Its place in the output; () is the output itself.
    """

    source: Path
    target: Path


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_input(self, x: Tensor, source: Path | None = None) -> "Call":
        """Return the same call with another hidden state.

        Args:
            x: The hidden state.
            source: Its place. Default: as in `hidden_in`.

        Returns:
            A new call; this one is not changed.
        """
        source = source or default_source(self.args, self.kwargs)
        assert source, "the call has a hidden state"
        return Call(*replaced(self.args, self.kwargs, source, x))


def default_source(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Path | None:
    """Return the default place of the hidden state among arguments.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The place; None if there is no tensor.
    """
    if args:
        path = default_target(args[0])
        return None if path is None else (0, *path)
    return next(((name,) for name, value in kwargs.items() if isinstance(value, Tensor)), None)


def default_target(output: object) -> Path | None:
    """Return the default place of the hidden state in an output.

    Args:
        output: Output of the block.

    Returns:
        The place of its first item; None if that is not a tensor.
    """
    if isinstance(output, Tensor):
        return ()
    for key, value in _items(output):
        path = default_target(value)
        return None if path is None else (key, *path)
    return None


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any], source: Path | None = None) -> Tensor | None:
    """Return the hidden state that a block is called with.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        source: Its place. Default: the first positional argument, or its first item; without positional arguments the
            first tensor among the keyword arguments.

    Returns:
        The hidden state; None if there is no tensor at this place.
    """
    if source is None:
        source = default_source(args, kwargs)
    if not source:
        return None
    return _get(args if isinstance(source[0], int) else kwargs, source)


def hidden_out(output: object, target: Path | None = None) -> Tensor | None:
    """Return the hidden state in a block's output.

    Args:
        output: Output of the block.
        target: Its place. Default: the output, or the first item of a tuple, list, mapping or dataclass.

    Returns:
        The hidden state; None if there is no tensor at this place.
    """
    if target is None:
        target = default_target(output)
    return None if target is None else _get(output, target)


def with_hidden(output: Any, hidden: Tensor, target: Path | None = None) -> Any:
    """Replace the hidden state in a block's output.

    Args:
        output: Output of the block: a tensor, tuple, named tuple, list, mapping or dataclass.
        hidden: New hidden state.
        target: Its place. Default: as in `hidden_out`.

    Returns:
        An output of the same form.
    """
    if target is None:
        target = default_target(output)
    return hidden if target is None else _put(output, target, hidden)


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Path, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the hidden state among arguments.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        source: Place of the hidden state.
        x: New hidden state.

    Returns:
        The new arguments.
    """
    if isinstance(source[0], int):
        return _put(args, source, x), dict(kwargs)
    return args, _put(dict(kwargs), source, x)


def tensors_at(value: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Iterate over the tensors in nested tuples, lists, mappings and dataclasses.

    Args:
        value: The value.
        path: Its own place.

    Yields:
        Place and tensor.
    """
    if isinstance(value, Tensor):
        yield path, value
    for key, item in _items(value):
        yield from tensors_at(item, (*path, key))


def _items(value: object) -> Iterator[tuple[int | str, object]]:
    """Keys and values of a container, in their order."""
    if isinstance(value, tuple | list):
        yield from enumerate(cast(Sequence[object], value))
    elif isinstance(value, Mapping):
        yield from cast(Mapping[str, object], value).items()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((one.name, getattr(value, one.name, None)) for one in fields(cast(Any, value)))


def _get(value: Any, path: Path) -> Tensor | None:
    for key in path:
        if isinstance(value, Mapping):
            value = cast(Mapping[object, Any], value).get(key)
        elif isinstance(value, tuple | list):
            items = cast(Sequence[Any], value)
            value = items[key] if isinstance(key, int) and key < len(items) else None
        else:
            value = getattr(value, str(key), None)
    return value if isinstance(value, Tensor) else None


def _put(value: Any, path: Path, new: Tensor) -> Any:
    """A copy of `value` with another tensor at `path`."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, tuple | list):
        form = cast(Callable[..., Any], type(cast(object, value)))
        items = list(cast(Sequence[Any], value))
        items[cast(int, key)] = _put(items[cast(int, key)], rest, new)
        return form(*items) if hasattr(form, "_fields") else form(items)
    copied = copy.copy(value)
    if isinstance(value, Mapping):
        copied[key] = _put(value[key], rest, new)
    else:
        object.__setattr__(copied, str(key), _put(getattr(value, str(key)), rest, new))
    return copied
