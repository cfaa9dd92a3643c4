"""Export: use a trained network without resist.

    from resist.export import fold_scale
    ordinary = fold_scale(job.full_model(batches), images)          # no hooks: torch.save, torch.export, timm, ...

| `to` | file |
| --- | --- |
| `safetensors` | state dict, and metadata: classes, normalization, the code that builds the network |
| `torch` | state dict for `torch.load(weights_only=True)` |
| `timm` | state dict for `timm.create_model(NAME, ...)`, from runs of timm:NAME and of preact_resnet..._imagenet |
| `torchvision` | the same for `torchvision.models`, from runs of torchvision:NAME |
| `program` | program for `torch.export.load`, which needs none of these libraries |
| `onnx` | graph for onnxruntime and other runtimes, without torch |

| `scale` | what happens to the factor of each chain block's branch |
| --- | --- |
| `fold` | it is multiplied into the weights, exactly; where that is impossible, an error gives the reason |
| `keep` | weights stay as they are, scales go into the metadata; `load_scaled` applies them; programs contain them |
| `approximate` | as `fold`, also where an activation follows the sum; the accuracy of both networks is measured |
"""

from resist.export.comparing import difference
from resist.export.files import load_scaled
from resist.export.folding import Fold, fold, fold_scale
from resist.export.run import Export, export_run
from resist.subnet.scaling import records_of, scale_blocks, scales_of

__all__ = [
    "Export",
    "Fold",
    "difference",
    "export_run",
    "fold",
    "fold_scale",
    "load_scaled",
    "records_of",
    "scale_blocks",
    "scales_of",
]
