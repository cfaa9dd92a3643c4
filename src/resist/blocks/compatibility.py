"""Block compatibility: properties that must match within one slot.

Classes and shapes must match. Attributes and hooks may differ if they can go with their block, see
`resist.blocks.attributes`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import nn
from torch.jit import ScriptModule
from torch.nn.utils import parametrize

from resist.blocks.attributes import AttributeKey, Varying, attributes, unequal, varying
from resist.blocks.contents import class_content, is_importable
from resist.blocks.modules import buffers_of, children_of, named_modules, parameters_of
from resist.blocks.snapshots import Content

__all__ = ["Varying", "difference", "fixed", "nearest_miss", "scalars", "varying"]


class Attributes:
    """The attributes of a block; equal to those of another block if what differs can go with the blocks.

    Args:
        block: A block, on any device.
    """

    def __init__(self, block: nn.Module) -> None:
        self.contents = attributes(block)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and not self.difference(other)

    __hash__ = None  # type: ignore[assignment]

    def difference(self, other: "Attributes") -> str:
        """Describe the first difference that cannot go with the blocks.

        Args:
            other: The attributes of another block.

        Returns:
            A part of a sentence, "" without one.
        """
        for key, *sides in unequal(self.contents, other.contents):
            for content in sides:
                if content is not None and (reason := content.obstacle()):
                    return f"{'.'.join(filter(None, key))}, which {reason}"
        return ""


class _Kind:
    """Class of a module; equal to another one that the same code has made."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = original_class(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and _same_kind(self.kind, other.kind)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.kind.__name__


def original_class(module: nn.Module) -> type:
    """Return the class of a module as its code names it.

    Args:
        module: Any module.

    Returns:
        Its class; for a module with parametrizations, for each of which torch makes a class, the class before them.
    """
    if hasattr(module, "parametrizations"):
        return parametrize.type_before_parametrizations(module)
    return type(module)


def _same_kind(first: type, second: type) -> bool:
    """True if blocks can exchange these classes: they are equal, or made by the same code with other values."""
    if first is second:
        return True
    if is_importable(first) or is_importable(second) or len(first.__bases__) != len(second.__bases__):
        return False
    left, right = class_content(first), class_content(second)
    codes = [{n: getattr(v, "__code__", None) for n, v in content.items()} for content in (left, right)]
    return codes[0] == codes[1] and all(map(_same_kind, first.__bases__, second.__bases__))


def fixed(block: nn.Module) -> dict[str, object]:
    """Collect the properties that blocks in the same slot must share.

    Args:
        block: A block, on any device.

    Returns:
        Classes, shapes and types of weights by a readable name; under "", the attributes, compared as a whole.
    """
    properties: dict[str, object] = {}
    for prefix, module in named_modules(block, remove_duplicate=False):
        properties[f"the class of {prefix or 'the block'}"] = _Kind(module)
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, ScriptModule):
            properties[f"the script of {prefix or 'the block'}"] = _script(module)
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                properties[f"parameter {dot}{name}"] = (
                    tuple(parameter.shape),
                    parameter.dtype,
                    parameter.requires_grad,
                )
        for name, buffer in buffers_of(module).items():
            if buffer is not None:
                persistent = name not in vars(module)["_non_persistent_buffers_set"]
                properties[f"buffer {dot}{name}"] = (tuple(buffer.shape), buffer.dtype, persistent)
    properties[""] = Attributes(block)
    return properties


def _script(module: ScriptModule) -> str:
    """Code and attributes of a compiled module as text, without its weights, addresses and numbers of classes."""
    code: str = module._c.dump_to_str(True, True, False)  # pyright: ignore
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    names = "|".join(re.escape(name.rpartition(".")[2]) for name in tensors) or "(?!)"
    code = re.sub(rf"^ *({names}) = [^\[]*\[ .*$", "", code, flags=re.MULTILINE)
    return re.sub(r"___torch_mangle_\d+\.|0x[0-9a-f]+", "", code)


def scalars(block: nn.Module) -> dict[AttributeKey, Content]:
    """Collect the attributes that may differ between blocks of a slot.

    Args:
        block: A block, on any device.

    Returns:
        Contents by (dotted name of the module, attribute); see `resist.blocks.attributes.attributes`.
    """
    return attributes(block)


def difference(model: nn.Module, container: str, first: int, last: int) -> str:
    """Describe the first difference between neighboring blocks.

    Args:
        model: The full network.
        container: Dotted name of a module.
        first: Position of the first of its children to compare.
        last: Position of the last one, included.

    Returns:
        A part of a sentence, "" if all these blocks are compatible or the container does not exist.
    """
    try:
        children = _children(model.get_submodule(container))[first : last + 1]
    except AttributeError:
        return ""
    for number, (left, right) in enumerate(pairwise(children), first):
        if reason := _compare(left, right):
            return f"blocks {number} and {number + 1} of {container or 'the model'} differ in {reason}"
    return ""


def nearest_miss(model: nn.Module) -> str:
    """Explain why the longest row of equal classes is not a chain.

    Args:
        model: The full network.

    Returns:
        A part of a sentence, "" if no two neighbors have the same class.
    """
    best = (0, "")
    for container, module in named_modules(model):
        children, start = _children(module), 0
        for end in range(1, len(children) + 1):
            if end < len(children) and type(children[end]) is type(children[start]):
                continue
            first = children[start]
            composite = next(first.children(), None) is not None and type(first) not in (nn.Sequential, nn.ModuleList)
            if composite and end - start > max(best[0], 1):
                best = end - start, _reason(model, container, start, end - 1)
            start = end
    return best[1]


def _reason(model: nn.Module, container: str, first: int, last: int) -> str:
    module = model.get_submodule(container)
    where = f"{container or 'the model'} blocks {first} to {last}"
    blocks = _children(module)[first : last + 1]
    properties = [fixed(child) for child in blocks]
    matching = any(left == right for left, right in pairwise(properties))
    if matching and not isinstance(module, nn.Sequential | nn.ModuleList):
        return f"{where} are children of a {type(module).__name__}, which is not an nn.Sequential or nn.ModuleList"
    if reason := difference(model, container, first, last):
        return reason
    if not any(True for block in blocks for _ in block.parameters()):
        return f"{where} have no parameters"
    uses, within = _uses(model), [_uses(block) for block in blocks]
    if any(uses[parameter] != number for block in within for parameter, number in block.items()):
        return f"{where} have parameters in common with one another or with another part of the model"
    return f"{where} are equal, but not residual blocks with parameters of their own"


def _uses(module: nn.Module) -> Counter[int]:
    """Number of names of each parameter, by its id."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _children(module: nn.Module) -> list[nn.Module]:
    """All children; one that is registered twice appears twice."""
    return [child for child in children_of(module).values() if child is not None]


def _compare(first: nn.Module, second: nn.Module) -> str:
    """The first difference between two blocks, attributes that can go with a block last; "" if none."""
    left, right = fixed(first), fixed(second)
    for name in [*left, *(n for n in right if n not in left)]:
        if name not in left or name not in right:
            return f"{name}: only {'the first' if name in left else 'the second'} has it"
        ours, others = left[name], right[name]
        if isinstance(ours, Attributes) and isinstance(others, Attributes):
            if reason := ours.difference(others):
                return reason
        elif ours != others:
            return f"{name}: {_short(ours)} and {_short(others)}"
    for key, ours, others in unequal(scalars(first), scalars(second)):
        name = ".".join(filter(None, key))
        if ours is None or others is None:
            return f"{name}: only {'the second' if ours is None else 'the first'} has it"
        return f"{name}: {_short(ours.value)} and {_short(others.value)}"
    return ""


def _short(value: object) -> str:
    """A value as text of at most 60 characters."""
    items: Sequence[object] = cast(Sequence[object], value) if isinstance(value, tuple) else []
    if items and isinstance(items[0], tuple):  # a tensor: its shape
        value = cast(object, items[0])
    if isinstance(value, type):
        value = value.__name__
    text = value if isinstance(value, str) else repr(cast(object, value))
    return text if len(text) <= 60 else text[:57] + "..."
