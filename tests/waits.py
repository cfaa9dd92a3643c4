"""Waits of the host for a GPU, found without one: the operations run on fake tensors of a CUDA device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resist.data import in_memory
from resist.sync import codecs

aten = torch.ops.aten
# Their results have a shape or a value that the host must know.
VALUES = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.is_nonzero}


class Waits(TorchDispatchMode):
    """Records the operations that make the host wait for a GPU.

    Attributes:
        found: A line for each of them.
        copies: Number of copies to the GPU.
        pinned: Number of tensors that were pinned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget what was found."""
        self.found: list[str] = []
        self.copies = self.pinned = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in (*tensors, *tree_leaves(result)) if isinstance(tensor, Tensor)}
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_) and devices == {"cpu", "cuda"}:
            asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
            self.copies += 1
            if not asynchronous:
                self.found.append(f"{packet}, blocking, {[tuple(tensor.shape) for tensor in tensors]}")
        elif "cuda" in devices:
            masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
                isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1])
            )
            if packet in VALUES or masks:
                self.found.append(str(packet))
        return result


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Run on fake tensors, which have no values, and record what would wait for a GPU."""
    waits = Waits()

    def pin_memory(tensor: Tensor) -> Tensor:
        waits.pinned += 1
        return tensor

    _forget_tables()
    try:
        with patch.object(Tensor, "pin_memory", pin_memory), FakeTensorMode(allow_non_fake_inputs=True), waits:
            yield waits
    finally:
        _forget_tables()


def _forget_tables() -> None:
    """Clear what is kept on a device: it is fake inside, and not outside."""
    in_memory._moments.cache_clear()
    codecs._table.cache_clear()
