"""The full network on disk: `model.safetensors`, its tensors under the names that the network itself gives them.

The metadata has for each chain the scales of its blocks' branches. Files of the format before name the container of a
chain, its first and last child, and one scale instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resist.blocks.chain import Chain
from resist.errors import UserError
from resist.runs.tensor_file import FormatError, read_tensors, verify_tensors, write_tensors
from resist.subnet.scaling import ScaleRecord, records_for, scale_blocks

FILE = "model.safetensors"
EMA_FILE = "model_ema.safetensors"  # of the averaged weights, of a run that has them
FORMAT, FORMAT_BEFORE = "resist full network 4", "resist full network 3"


def save_full(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float], path: Path) -> None:
    """Write the weights of a full network.

    `path` appears complete or not at all.

    Args:
        model: The full network, on any device.
        chains: Its chains.
        scales: The scale of each chain's branches.
        path: File to write.

    Raises:
        UserError: The file cannot be written.
    """
    scaled = [{"blocks": records_for(chain, scale)} for chain, scale in zip(chains, scales, strict=True)]
    write_tensors(path, model.state_dict(), FORMAT, {"chains": scaled})


def load_full(model: nn.Module, path: Path, *, scaled: bool = True) -> nn.Module:
    """Load a full network, and scale its branches as saved.

    Args:
        model: The network that config.json describes; it may be on the meta device.
        path: File to read.
        scaled: Scale the branches. Otherwise they are left as they are.

    Returns:
        `model`.

    Raises:
        UserError: The file is missing, damaged, of another version, or of another network.
    """
    tensors, scales = read_full(path)
    expected = model.state_dict()
    wrong = [n for n, t in expected.items() if n not in tensors or tensors[n].shape != t.shape]
    wrong += [n for n in tensors if n not in expected]
    if wrong:
        raise UserError(f"{path} holds another network than config.json describes: {wrong[0]!r} differs")
    model.load_state_dict(tensors, assign=True)
    return scale_blocks(model, scales) if scaled else model


def read_full(path: Path) -> tuple[dict[str, Tensor], dict[str, ScaleRecord]]:
    """Read the file of a full network.

    Args:
        path: File to read.

    Returns:
        The tensors by name, and the scales of branches as `resist.subnet.scaling.records_of` lists them.

    Raises:
        UserError: The file is missing, damaged, or of another version.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; the run has not finished")
    file_format = FORMAT
    try:
        metadata = verify_tensors(path, FORMAT).metadata
    except FormatError as error:
        try:
            metadata = verify_tensors(path, FORMAT_BEFORE).metadata
        except FormatError:
            raise error from None
        file_format = FORMAT_BEFORE
    tensors = read_tensors(path, file_format)
    scales: dict[str, ScaleRecord] = {}
    try:
        for chain in metadata["chains"]:
            scales |= _scales_of_run(chain, tensors) if file_format == FORMAT_BEFORE else dict(chain["blocks"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no scales; it is damaged") from error
    return tensors, scales


def _scales_of_run(chain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, ScaleRecord]:
    """Scales in a file of the format before, whose chains are runs of children of an nn.Sequential or nn.ModuleList."""
    names = [
        f"{chain['container']}.{index}".lstrip(".") for index in range(int(chain["first"]), int(chain["last"]) + 1)
    ]
    for name in names:
        if not any(tensor.startswith(f"{name}.") for tensor in tensors):
            raise KeyError(name)
    return dict.fromkeys(names, float(chain["scale"]))
