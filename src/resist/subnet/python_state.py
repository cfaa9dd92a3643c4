"""Python state: attributes that the blocks' own code changes in training, which go with their block.

A running mean that is a Python number, a deque of recent losses, a generator of random numbers, a cache. They are
exchanged as loose buffers are: all changed attributes of a block are one tensor of bytes, pickled. It goes between the
processes of one job only, and is never on disk. Only plain values and classes of the block's own source are read back.
What the user sets is left alone, see `resist.blocks.placement`.
"""

import io
import logging
import pickle
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from resist.blocks.attributes import CLASS, HOOKS, AttributeKey, attributes, set_value, value_of
from resist.blocks.chain import Chain
from resist.blocks.comparison import Comparison
from resist.blocks.contents import Scope, attributes_of_module, clear_caches, touches
from resist.blocks.copying import copied
from resist.blocks.modules import named_modules
from resist.blocks.own_changes import is_changed_by_itself
from resist.blocks.snapshots import MISSING, Content, Snapshot, part_of, snapshot_of

log = logging.getLogger(__name__)

PYTHON = "python state"  # name of the tensor of bytes among the loose buffers of a block
# Classes and functions that are read back, besides classes of the modules in which a block's own classes are defined.
PLAIN = {
    "builtins": "bytearray complex frozenset range set slice",
    "collections": "ChainMap Counter OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy._core.numeric": "_frombuffer",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "random": "Random",
    "torch": "Size device",
    "types": "SimpleNamespace",
}
MOST_BYTES = 1 << 20  # of one attribute; results that a module keeps, such as attention maps, can be large


class PythonState:
    """Attributes of the blocks of a network as they were built, to find what has changed since.

    Args:
        chains: Chains of the network.
        blocks: The first block of each chain, as it was built.
    """

    def __init__(self, chains: Sequence[Chain], blocks: Sequence[nn.Module]) -> None:
        self._chains = chains
        built = [_snapshot(block) for block in blocks]
        self._built = [snapshot for snapshot, _ in built]  # the attributes of a block, as one dictionary
        self._unknown = [unknown for _, unknown in built]
        self._varying = [{(one.module, one.name): one.values for one in chain.varying} for chain in chains]

    def pack(self, block: nn.Module, chain: int, number: int) -> Tensor | None:
        """Pack the attributes that have changed.

        Args:
            block: A block of a sub-network.
            chain: Number of its chain.
            number: Number of the chain's block that it is.

        Returns:
            The attributes as bytes, (size,) uint8 on the CPU; None if there are none.
        """
        changed, values = self._changed(block, chain, number), dict[AttributeKey, object]()
        if not changed:
            return None
        scope = Scope(block)
        for key, value in changed.items():
            try:
                size = len(_dumps(value, scope, block))
            except Exception as error:  # values of users can raise anything
                self._note(chain, key, f"cannot be copied to another process ({type(error).__name__})")
                continue
            if size > MOST_BYTES:
                self._note(chain, key, f"has {size} bytes, more than {MOST_BYTES}")
                continue
            values[key] = value
        return torch.frombuffer(bytearray(_dumps(values, scope, block)), dtype=torch.uint8) if values else None

    def put(self, block: nn.Module, chain: int, number: int, packed: Tensor | None) -> None:
        """Give a block the attributes that `pack` returned for the block that is now there.

        Args:
            block: A block of a sub-network, changed in place.
            chain: Number of its chain.
            number: Number of the chain's block that it is now.
            packed: The attributes as bytes, on any device. None: all are as they were built.
        """
        values: dict[AttributeKey, object] = {}
        if packed is not None:
            values = _Unpickler(io.BytesIO(packed.cpu().numpy().tobytes()), block).load()
        for key in self._changed(block, chain, number):
            if key not in values:
                value = self._value(chain, key, number)
                set_value(block.get_submodule(key[0]), key[1], copied(value.value, value.parts_in(block)))
        for (module, name), value in values.items():
            set_value(block.get_submodule(module), name, value)
        clear_caches(block)

    def _value(self, chain: int, key: AttributeKey, number: int) -> Snapshot:
        """The value that an attribute of a block was built with."""
        if key in self._varying[chain]:
            return snapshot_of(self._varying[chain][key][number])
        built = self._built[chain]
        return Snapshot(built.value.get(key, MISSING), built.own)

    def _changed(self, block: nn.Module, chain: int, number: int) -> dict[AttributeKey, object]:
        """The present values of the attributes that the block's own code has changed."""
        known, changed = dict[str, list[str]](), dict[AttributeKey, object]()
        for prefix, name in (*self._built[chain].value, *self._varying[chain]):
            known.setdefault(prefix, []).append(name)
        comparison: Comparison | None = None
        for prefix, module in named_modules(block):
            if isinstance(module, ScriptModule) or type(module).__module__.startswith("torch.nn.modules."):
                continue  # they change no attributes
            for name in dict.fromkeys((*attributes_of_module(module), *known.get(prefix, ()))):
                key, now = (prefix, name), value_of(module, name)
                before = self._value(chain, key, number)
                if now is before.value or name in (CLASS, HOOKS) or key in self._unknown[chain]:
                    continue
                if key in self._varying[chain]:
                    same = Comparison(before.scope, Scope(block)).same(before.value, now)
                else:
                    comparison = comparison or Comparison(before.scope, Scope(block))
                    same = comparison.same(before.value, now)
                if not same and not touches(now, _is_result) and is_changed_by_itself(module, name, before.value, now):
                    changed[key] = now
        return changed

    def _note(self, chain: int, key: AttributeKey, reason: str) -> None:
        """Say once that an attribute cannot go with its block."""
        name, noted = ".".join(filter(None, key)), self._chains[chain].noted
        if name not in noted:
            noted.add(name)
            log.warning(
                "%s of the blocks of %s changes in training and does not go with its block: it %s; keep it in a buffer",
                name,
                self._chains[chain].name,
                reason,
            )


def _is_result(part: object) -> bool:
    """True for a result of a forward pass that a module keeps."""
    return isinstance(part, Tensor) and part.grad_fn is not None


def _snapshot(block: nn.Module) -> tuple[Snapshot, set[AttributeKey]]:
    """Copy the attributes of a block as one dictionary, without those that cannot be copied, which are named."""
    contents = attributes(block)
    unknown = {key for key, content in contents.items() if content.obstacle()}
    values = {key: content.value for key, content in contents.items() if key not in unknown}
    return snapshot_of(Content(values, Scope(block)).snapshot()), unknown


class _Pickler(pickle.Pickler):
    """Pickles values of a block, with tensors as bytes, and its own modules and tensors by their position.

    Args:
        file: File to write to.
        scope: Scope of the block.
        block: The block.
    """

    def __init__(self, file: io.BytesIO, scope: Scope, block: nn.Module) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._scope, self._own = scope, _own_source(block)

    def reducer_override(self, obj: Any) -> Any:
        """Refuse the classes and functions that `_Unpickler` refuses; pickle the rest as usual."""
        if isinstance(obj, type | FunctionType | BuiltinFunctionType):
            _check_allowed(obj.__module__, obj.__qualname__, obj, self._own)
        return NotImplemented

    def persistent_id(self, obj: Any) -> tuple[object, ...] | None:
        """Return what stands for a part of a value.

        Args:
            obj: The part.

        Returns:
            The position of a part of the block; the content of another tensor; None for what is pickled as usual.
        """
        if obj in self._scope:
            return "own", self._scope.positions[id(obj)]
        if isinstance(obj, nn.Module | nn.Parameter):
            raise pickle.PicklingError("a module or parameter outside of the block")
        if isinstance(obj, Tensor):
            content = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return "tensor", content, str(obj.dtype).removeprefix("torch."), tuple(obj.shape), obj.device.type != "cpu"
        if isinstance(obj, torch.Generator):
            return "generator", obj.device.type, obj.get_state().numpy().tobytes()
        return None


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` has written.

    Args:
        file: File to read from.
        block: The block in which the values are used.
    """

    def __init__(self, file: io.BytesIO, block: nn.Module) -> None:
        super().__init__(file)
        self._block, self._own = block, _own_source(block)
        weight = next(block.parameters(), None)
        self._device = None if weight is None else weight.device

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return a class or function, if it is harmless: bytes that were changed on the way must not run code."""
        if module_name not in PLAIN and module_name not in self._own:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not read from another process")
        found = super().find_class(module_name, global_name)
        _check_allowed(module_name, global_name, found, self._own)
        return found

    def persistent_load(self, pid: Any) -> object:
        """Return the part that a tuple of `_Pickler.persistent_id` stands for.

        Args:
            pid: The tuple.

        Returns:
            The part.
        """
        match pid:
            case ("own", position):
                return part_of(self._block, position)
            case ("generator", device, content):
                here = self._device is not None and self._device.type == device  # on the GPU of this process
                generator = torch.Generator(self._device if here else device)
                generator.set_state(_tensor(content))
                return generator
            case (_, content, dtype, shape, on_device):
                tensor = _tensor(content).view(getattr(torch, dtype)).view(shape)
                return tensor.to(self._device) if on_device and self._device is not None else tensor
            case _:
                raise pickle.UnpicklingError(f"{pid!r} stands for nothing")


def _tensor(content: bytes) -> Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _own_source(block: nn.Module) -> set[str]:
    """Names of the modules in which the classes of a block are defined."""
    return {type(module).__module__ for module in block.modules()}


def _check_allowed(module_name: str, name: str, found: object, own: set[str]) -> None:
    """Raise UnpicklingError unless a class or function may be read."""
    constant = isinstance(found, torch.dtype | torch.memory_format | torch.layout)
    plain = name in PLAIN.get(module_name, "").split()
    if not (constant or plain or (isinstance(found, type) and module_name in own)):
        raise pickle.UnpicklingError(f"{module_name}.{name} is not read from another process")


def _dumps(value: object, scope: Scope, block: nn.Module) -> bytes:
    file = io.BytesIO()
    _Pickler(file, scope, block).dump(value)
    return file.getvalue()
