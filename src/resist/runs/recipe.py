"""Rules of a training recipe: which clipping, averaging and augmentation are possible with which data."""

import math
from typing import TYPE_CHECKING

from resist.errors import UserError

if TYPE_CHECKING:
    from resist.runs.config import OptimizationConfig

# Data sets of photographs, which are read from files during training: of labeled ones, and with boxes around objects.
PHOTOGRAPHS = ("folder", "imagenet")
DETECTION = ("voc2007", "voc2012")
STREAMED = PHOTOGRAPHS + DETECTION


def check_recipe(o: "OptimizationConfig", data: str) -> None:
    """Check gradient clipping, the average of the weights, and the augmentation.

    The optimizer's own options are checked in `resist.training.optimizers`, which imports torch.

    Args:
        o: The options of training.
        data: Name of the data set.

    Raises:
        UserError: A value is invalid, or the data set does not support it.
    """
    if o.nesterov and o.momentum == 0:
        raise UserError("`nesterov` needs `momentum` above 0; give one, or remove `nesterov`")
    if o.model_ema_decay is not None and not 0 < o.model_ema_decay < 1:
        raise UserError(f"`model_ema_decay={o.model_ema_decay}` is not between 0 and 1; give for example 0.999")
    if o.rand_augment is not None:
        num_ops, magnitude = o.rand_augment
        if not (1 <= num_ops <= 14 and 0 <= magnitude <= 30):
            raise UserError(
                f"`rand_augment={num_ops} {magnitude}`; give 1 to 14 operations and a magnitude from 0 to 30"
            )
        if data not in PHOTOGRAPHS:
            raise UserError(
                f"`rand_augment` has no effect with `data={data}`, only with {', '.join(PHOTOGRAPHS)}; remove it"
            )
    for name in ("mixup", "cutmix"):
        if getattr(o, name) and data in DETECTION:
            raise UserError(f"`{name}` has no effect with `data={data}`, whose labels are boxes; remove it")
        if getattr(o, name) and o.batch_size == 1:
            raise UserError(f"`{name}` has no effect with `batch_size=1`; give a larger one, or remove it")
    for name, value in o.optimizer_args.items():
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, int | float | str | None) or (isinstance(item, float) and not math.isfinite(item)):
                raise UserError(
                    f"`optimizer_args`: {name[:40]} is not a finite number, true, false, a string or a list of them"
                )
