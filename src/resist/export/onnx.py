"""Export to ONNX by torch.onnx, checked by onnxruntime where it is installed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resist.errors import UserError, first_line
from resist.export.comparing import detached
from resist.export.files import check_target, write_file
from resist.export.folding import TOLERANCE

INPUT, OUTPUT = "images", "logits"
MAX_BYTES = 2**31 - 2**20  # a file is one message of protobuf, and has a little more than the weights


def check_installed() -> None:
    """Raise UserError where onnxscript, which torch.onnx needs, is not installed."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("`to=onnx` needs onnxscript: pip install 'torch-resist[onnx]'") from error


def write_onnx(path: Path, model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> float | None:
    """Convert a model for any batch size, compare and write it.

    Args:
        path: A new file with the suffix .onnx.
        model: The network, in eval mode; scales that are applied by hooks become part of the graph.
        images: Example input (batch, channels, height, width), batch at least 2.
        metadata: Strings by name, for the file's metadata.

    Returns:
        The largest difference between the logits of onnxruntime and torch, relative to the largest logit, for one image
        and for all; None where onnxruntime is not installed.

    Raises:
        UserError: A package is missing, torch.onnx cannot convert the model, onnxruntime computes something else, or
            the file exists or cannot be written.
    """
    check_target(path, (".onnx",))
    check_installed()
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise UserError(f"this network has {num_bytes / 1e9:.1f} GB, an ONNX file at most 2; give `to=program`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converter, about its own parts
            content = _convert(detached(model), images, metadata)
    except Exception as error:  # any error of the tracer, the converter or the network's code
        raise UserError(f"torch.onnx cannot convert this network ({first_line(error)}); give `to=program`") from error
    error = _compare(content, model, images)
    if error is not None and not error <= TOLERANCE:
        raise UserError(
            f"onnxruntime does not compute the same as this network (error {error:.1e} of the largest logit); give "
            "`to=program`"
        )
    write_file(path, content)
    return error


def _convert(model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program: Any = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=[INPUT], output_names=[OUTPUT],
        verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _compare(content: bytes, model: nn.Module, images: Tensor) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        errors: list[float] = []
        for batch in (images[:1], images):
            found = torch.from_numpy(session.run(None, {INPUT: batch.numpy()})[0])
            with torch.no_grad():
                expected = model(batch)
            errors.append(float((found - expected).abs().max() / expected.abs().max()))
    except Exception as error:  # any error of onnxruntime
        raise UserError(f"onnxruntime cannot run this network ({first_line(error)}); give `to=program`") from error
    return max(errors)
