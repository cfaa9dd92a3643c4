"""What a worker has for itself of what everyone trains, saved by worker so that a loaded job goes on bit for bit.

- What codes have lost, and send later.
- With fragments, its own weights: it has trained since the fragments were averaged. The network of a checkpoint has the
  weights that all workers agree on.

Both fit a job with the same plan, the same format and as many fragments. In others errors begin at zero, which loses
the rounding of one round once, and all workers begin with what they agree on, which drops up to a round of each
worker's own training of the shared part.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resist.errors import UserError
from resist.planning.wire import Wire
from resist.state.values import decode, encode
from resist.sync.worker import Worker

ERRORS = ("error", "piece_error")


def own_record(worker: Worker, wire: Wire, tensors: dict[str, Tensor], path: tuple[str, ...]) -> dict[str, Any]:
    """Write what a worker has for itself as JSON values.

    Args:
        worker: The worker, between two rounds.
        wire: Formats of the job.
        tensors: Key -> tensor. Tensors are added, not copied.
        path: Beginning of their keys.

    Returns:
        The values; empty if there is nothing.
    """
    fragments: list[dict[str, Any]] = []
    for number, fragment in enumerate(worker.fragments):
        own = {name: getattr(fragment.feedback, name) for name in ERRORS}
        if worker.apart:
            own["weights"] = fragment.read(worker.subnet.flats[torch.float32])
        fragments.append(
            {
                name: encode(value, tensors, path=(*path, str(number), name), what=name)
                for name, value in own.items()
                if value is not None
            }
        )
    return {**_form(worker, wire), "of": fragments} if any(fragments) else {}


def load_own(
    worker: Worker, wire: Wire, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Callable[[], None]:
    """Check what `own_record` has written, and return what loads it.

    Args:
        worker: The worker.
        wire: Formats of this job.
        saved: The values; empty if there are none.
        tensors: The tensors that they refer to.
        source: Where they come from, for messages.

    Returns:
        Loads it, where it fits. Call it when the worker has the weights and anchors of the round.

    Raises:
        UserError: If it is damaged.
    """
    found = [{name: decode(value, tensors) for name, value in own.items()} for own in saved.get("of", ())]
    for name, value in (item for own in found for item in own.items()):
        kept = torch.bfloat16 if name in ERRORS else torch.float32
        if value.dtype not in (kept, torch.float32) or value.dim() != 1:
            raise UserError(f"{source} is damaged: {name} has {value.dtype} of {value.dim()} dimensions")

    def apply() -> None:
        fits = all(saved.get(name) == value for name, value in _form(worker, wire).items())
        if not fits or len(found) != len(worker.fragments):
            return
        sizes = [fragment.feedback.anchor.numel() for fragment in worker.fragments]
        for size, own in zip(sizes, found, strict=True):
            # Without fragments, errors may be of the shared part only, in a round that begins with all blocks.
            if any(own[name].numel() != size for name in ("weights",) if name in own):
                return
            if "error" in own and (own["error"].numel() > size or (len(found) > 1 and own["error"].numel() != size)):
                return
        for fragment, own in zip(worker.fragments, found, strict=True):
            device = fragment.feedback.anchor.device
            for name in ERRORS:
                value = own[name].to(device, torch.bfloat16, copy=True) if name in own else None
                setattr(fragment.feedback, name, value)
            if "weights" in own:
                fragment.write(worker.subnet.flats[torch.float32], own["weights"].to(device))
                worker.apart = True

    return apply


def _form(worker: Worker, wire: Wire) -> dict[str, Any]:
    """What has to be equal where it is loaded."""
    return {"format": wire.shared, "fragments": wire.fragments, "channels_last": worker.subnet.channels_last}
