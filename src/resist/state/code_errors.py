"""What codes have lost, and send later: saved by worker, so that a loaded job goes on bit for bit.

The errors fit a job with the same plan and the same format of the shared part. In others they begin
at zero, which loses the rounding of one round once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resist.errors import UserError
from resist.state.values import decode, encode
from resist.sync.worker import Worker

KEYS = ("error", "piece_error")


def errors_record(worker: Worker, format: str, tensors: dict[str, Tensor], path: tuple[str, ...]) -> dict[str, Any]:
    """Write the errors of a worker as JSON values.

    Args:
        worker: The worker, between two rounds.
        format: Wire format of the shared part.
        tensors: Key -> tensor. Tensors are added, not copied.
        path: Beginning of their keys.

    Returns:
        The values; empty if there are no errors.
    """
    feedback = worker.feedback
    if feedback is None or feedback.error is None:
        return {}
    values = {key: encode(getattr(feedback, key), tensors, path=(*path, key), what=key) for key in KEYS}
    return {"format": format, "channels_last": worker.subnet.channels_last, **values}


def load_errors(
    worker: Worker, format: str, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Callable[[], None]:
    """Check what `errors_record` has written, and return what loads it.

    Args:
        worker: The worker.
        format: Wire format of the shared part in this job.
        saved: The values.
        tensors: The tensors that they refer to.
        source: Where they come from, for messages.

    Raises:
        UserError: If they are damaged.
    """
    found: dict[str, Tensor | None] = {key: decode(saved[key], tensors) for key in KEYS} if saved else {}
    fits = saved.get("format") == format and saved.get("channels_last") == worker.subnet.channels_last
    for key, value in found.items():
        if value is not None and (value.dtype != torch.float32 or value.dim() != 1):
            raise UserError(f"{source} is damaged: {key} has {value.dtype} of {value.dim()} dimensions")

    def apply() -> None:
        feedback, error = worker.feedback, found.get("error")
        if feedback is None or error is None or not fits or error.numel() > feedback.anchor.numel():
            return
        device = feedback.anchor.device
        feedback.error = error.to(device, copy=True)
        piece = found["piece_error"]
        feedback.piece_error = None if piece is None else piece.to(device, copy=True)

    return apply
