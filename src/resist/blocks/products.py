"""Products: results of convolutions and matrix products, of which equal ones are computed once.

The runs of a rehearsal differ in a few blocks, and almost all of their time goes into such products. An operation that
gets the same numbers in the same form returns the same numbers, so its result is kept and given out again. Numbers are
compared by a hash of 64 bits of their memory.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import functools
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST_BYTES = 2**29  # of results that are kept; where they would be more, the first ones stay

_aten: Any = torch.ops.aten
_PRODUCTS = frozenset(
    packet.default for packet in (_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear)
)


class Products:
    """Results of convolutions and matrix products in several runs.

    A result is given out as it is, and dropped when an operation writes into it. Hashes of weights are kept from run to
    run, as long as nothing writes to them.
    """

    def __init__(self) -> None:
        self._results: dict[object, Tensor] = {}
        self._places: dict[int, object] = {}  # key of each result by the address of its memory
        self._num_bytes = 0
        self._given: set[object] = set()  # keys of results that this run has
        # By address: a parameter of that memory, and (version, hash) of the tensors in it.
        self._weights: dict[int, tuple[weakref.ref[nn.Parameter], dict[object, tuple[int, int]]]] = {}

    def begin(self, model: nn.Module) -> None:
        """Begin a run.

        Args:
            model: The network that is run.
        """
        self._given.clear()
        now = {_address(p): p for p in model.parameters() if p.layout == torch.strided and not p.is_meta}
        kept = self._weights
        self._weights = {}
        for address, parameter in now.items():
            known = kept.get(address)
            same = known is not None and known[0]() is parameter
            self._weights[address] = known if same and known is not None else (weakref.ref(parameter), {})

    def clear(self) -> None:
        """Drop all results."""
        for address in list(self._places):
            self._drop(address)

    @contextmanager
    def scope(self) -> Generator[None]:
        """Context at whose end the results of the runs in it are dropped."""
        before = set(self._places)
        try:
            yield
        finally:
            for address in self._places.keys() - before:
                self._drop(address)

    def forget_weights(self) -> None:
        """Drop the hashes of weights, which something else than a run may have changed."""
        self._weights.clear()

    def compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call an operation, or return what it returned before.

        Args:
            func: An operation of torch.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            What it returns.
        """
        if func not in _PRODUCTS:
            self._note_writes(func, args, kwargs)
            return func(*args, **kwargs)
        key = self._key((func, args, kwargs))
        if key is None:
            return func(*args, **kwargs)
        result = self._results.get(key)
        if result is not None:
            again = result.clone() if key in self._given else result.detach()
            self._given.add(key)
            return again
        result = func(*args, **kwargs)
        if self._num_bytes + result.nbytes <= MOST_BYTES:
            self._results[key] = result.detach()
            self._places[_address(result)] = key
            self._num_bytes += result.nbytes
            self._given.add(key)
        return result

    def _drop(self, address: int) -> None:
        """Drop the result in some memory, if there is one."""
        result = self._results.pop(self._places.pop(address, None), None)
        self._num_bytes -= 0 if result is None else result.nbytes

    def _note_writes(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Drop the results and the hashes of weights that an operation changes."""
        positions, names = _written(func)
        values = [args[i] for i in positions if i < len(args)] + [kwargs[name] for name in names if name in kwargs]
        for value in values:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
                    address = _address(tensor)
                    self._drop(address)
                    if address in self._weights:
                        self._weights[address][1].clear()

    def _key(self, value: Any) -> Any:
        """A value that is equal for equal arguments; None if there is no such value."""
        if isinstance(value, Tensor):
            return self._key_of_tensor(value)
        if isinstance(value, dict):
            value = tuple(value.items())
        if isinstance(value, list | tuple):
            keys = tuple(map(self._key, value))
            return None if None in keys else keys
        return type(value), value

    def _key_of_tensor(self, tensor: Tensor) -> Any:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg() or not _is_dense(tensor):
            return None
        form = tensor.dtype, tensor.shape, tensor.stride()
        weight = None if tensor.is_inference() else self._weights.get(_address(tensor))
        if weight is None:
            return form, _hash_of(tensor)
        place = tensor.data_ptr(), tensor.nbytes
        version, number = weight[1].get(place, (-1, 0))
        if version != tensor._version:
            number = _hash_of(tensor)
            weight[1][place] = tensor._version, number
        return form, number


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_dense(tensor: Tensor) -> bool:
    """True if a tensor's numbers fill their memory without gaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0 or (size > 1 and stride != expected):
            return False
        expected *= size
    return True


def _hash_of(tensor: Tensor) -> int:
    """Hash of the memory of a dense tensor."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    memory: Any = flat.numpy().view(_Memory)
    return hash(memoryview(memory).toreadonly())


class _Memory(np.ndarray[Any, Any]):
    """An array of which Python lets the memory be hashed."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


@functools.cache
def _written(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of the arguments that an operation changes."""
    arguments = func._schema.arguments
    changed = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return tuple(changed), tuple(arguments[i].name for i in changed)
