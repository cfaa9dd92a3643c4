"""Out of the house: the network of a job or of a run for people who do not use this package.

    from resist.export import fold_scale
    ordinary = fold_scale(job.full_model(batches), images)          # no hooks: torch.save, torch.export, timm, ...

    resist export RUN --to timm                                     # the same for a run directory: `export_run`

to      safetensors   state dict and metadata: classes, normalization, what builds the network
        torch         state dict that `torch.load(weights_only=True)` reads
        timm          state dict that `timm.create_model(NAME, ...).load_state_dict` takes, for runs of timm:NAME
        torchvision   the same for torchvision.models
        program       a program that `torch.export.load` runs without any of these
scale   fold          multiplied into the weights, exactly, or refused with the reason (see `resist.export.folding`)
        keep          weights as they are, scales in the metadata; `load_scaled` applies them; a program has them in it
        approximate   folded also where an activation follows the sum; the accuracy of both networks is told
"""

from resist.export.files import load_scaled
from resist.export.folding import Fold, difference, fold, fold_scale
from resist.export.run import Export, export_run
from resist.subnet.scaling import scale_blocks, scales_of

__all__ = [
    "Export",
    "Fold",
    "difference",
    "export_run",
    "fold",
    "fold_scale",
    "load_scaled",
    "scale_blocks",
    "scales_of",
]
