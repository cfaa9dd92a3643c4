"""Faster R-CNN: torchvision's detector on a pre-activation ResNet with a feature pyramid.

| module | content |
| --- | --- |
| `backbone.body` | stem and layer1 .. layer4 as in classification, without the head |
| `backbone.norms` | norm and ReLU of each section's output, which a pre-activation network returns as a plain sum |
| `backbone.fpn` | feature pyramid over the sections from stride 4 on, and one more level by subsampling |
| `rpn`, `roi_heads` | region proposals, and the class and box of each |

The blocks of `backbone.body.layer3` are the chain; everything after the backbone is shared. Only the backbone has
BatchNorm. The width of neck and heads follows the backbone: 256 and 1,024 channels, torchvision's defaults, where the
last section has 512 or more.

He et al., 2016; Lin et al., "Feature Pyramid Networks for Object Detection", 2017; Ren et al., "Faster R-CNN", 2015.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resist.errors import UserError

SECTIONS = ("layer1", "layer2", "layer3", "layer4")
MIN_STRIDE = 4
# Side of the square regions that are pooled from a level, and regions per image for the heads in training: as many as
# Fast R-CNN, since the 512 that are usual with pyramids take more time than a small backbone.
REGION, NUM_REGIONS = 7, 128


class Detector(FasterRCNN):
    """Faster R-CNN that also computes the features of a normalized batch.

    `forward(images, targets)` takes a list of images (3, height, width) float32 in 0..1, of any sizes. In eval mode it
    returns a dict for each image: `boxes` (detections, 4) in pixels, `labels` (detections,) and `scores`
    (detections,). In train mode it needs `targets` (for each image a dict of `boxes` and `labels`) and returns the
    losses by name.

    For a normalized tensor (batch, 3, height, width) it returns the levels of the pyramid by name, as needed to
    estimate BatchNorm statistics.
    """

    def forward(  # type: ignore[override]
        self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> Mapping[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(images, Tensor):
            return self.backbone(images)
        result: Any = super().forward(images, targets)
        return result


class Pyramid(nn.Module):
    """Feature pyramid over the sections of a body.

    It maps normalized images (batch, 3, height, width) to levels by name, each (batch, out_channels, height, width)
    float32.

    Args:
        body: A network with sections `layer1` .. `layer4` and `forward_stem`.

    Attributes:
        out_channels: Channels of every level.
        strides: Stride of each level in pixels.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        shapes = {name: shape for name, shape in section_shapes(body).items() if shape[1] >= MIN_STRIDE}
        channels = [shape[0] for shape in shapes.values()]
        self.out_channels = min(256, channels[-1] // 2)
        self.body = body
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(shape[0]) for name, shape in shapes.items()})
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool())
        self.strides = (*(shape[1] for shape in shapes.values()), 2 * shapes["layer4"][1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = {}
        for name, x in sections(self.body, images):
            if name in self.norms:
                levels[name] = F.relu(self.norms[name](x))
        return {name: level.float() for name, level in self.fpn(levels).items()}


class ProposalHead(RPNHead):
    """Proposal head with float32 outputs, also under autocast.

    In bfloat16, coordinates of boxes would be rounded to several pixels.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class Predictor(FastRCNNPredictor):
    """Box predictor with float32 outputs, also under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


def build_detector(body: nn.Module, num_classes: int, transform: GeneralizedRCNNTransform) -> Detector:
    """Build a detector on a classification network.

    Args:
        body: A network with sections `layer1` .. `layer4`, and `forward_stem`, which returns the input of the first.
            Its head is removed.
        num_classes: Classes of objects; background is class 0 in addition.
        transform: Transform of the input: normalize, resize, pad with zeros.

    Raises:
        UserError: `body` has no such sections, or `num_classes` is below 1.
    """
    if num_classes < 1:
        raise UserError(f"`num_classes={num_classes}`; must be at least 1")
    backbone = Pyramid(headless(body))
    width = backbone.out_channels
    # Two anchor sizes for each level, half an octave apart; the larger, 8 strides, is torchvision's only one.
    sizes = tuple((round(4 * 2**0.5 * stride), 8 * stride) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    detector = Detector(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=ProposalHead(width, anchors.num_anchors_per_location()[0]),
        box_roi_pool=MultiScaleRoIAlign(list(backbone.norms), REGION, sampling_ratio=2),
        box_head=TwoMLPHead(width * REGION**2, 4 * width),
        box_predictor=Predictor(4 * width, num_classes + 1),
        box_batch_size_per_image=NUM_REGIONS,
    )
    detector.transform = transform
    return detector


def headless(body: nn.Module) -> nn.Module:
    """Remove the last norm and the head of a network, in place.

    Raises:
        UserError: The network has no `forward_stem` or not the sections `layer1` .. `layer4`.
    """
    missing = [name for name in ("forward_stem", *SECTIONS) if not hasattr(body, name)]
    if missing:
        raise UserError(
            f"detection needs a network with forward_stem and layer1 .. layer4, such as preact_resnet50_imagenet; "
            f"{type(body).__name__} has no {missing[0]}"
        )
    for name in ("norm", "head"):
        if name in body._modules:
            setattr(body, name, nn.Identity())
    return body


def sections(body: Any, images: Tensor) -> list[tuple[str, Tensor]]:
    """Compute the output of each section, with its name.

    Args:
        body: A network with sections `layer1` .. `layer4` and `forward_stem`.
        images: Normalized images (batch, 3, height, width).
    """
    x, outputs = body.forward_stem(images), []
    for name in SECTIONS:
        x = body.get_submodule(name)(x)
        outputs.append((name, x))
    return outputs


def section_shapes(body: nn.Module) -> dict[str, tuple[int, int]]:
    """Compute (channels, stride in pixels) of each section on the meta device."""
    size = 64
    images = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        outputs = sections(copy.deepcopy(body).to("meta").eval(), images)
    return {name: (x.shape[1], size // x.shape[2]) for name, x in outputs}


def dense_pass(model: nn.Module, images: Tensor) -> Tensor:
    """Compute a scalar from all weights of a detector, without data.

    Regions depend on the values of weights, which the meta device does not have; each image gets NUM_REGIONS
    placeholder regions instead. The selection of regions (sorting, suppression) and their pooling are left out; all
    convolutions and matrix products are included.

    Args:
        model: A `Detector`.
        images: Normalized images (batch, 3, height, width).
    """
    assert isinstance(model, Detector)
    proposals, box_head, predictor = model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor
    assert isinstance(proposals, ProposalHead)
    assert isinstance(box_head, TwoMLPHead)
    assert isinstance(predictor, Predictor)
    levels = list(model.backbone(images).values())
    logits, deltas = proposals(levels)
    total = sum((level.square().mean() for level in (*logits, *deltas)), start=images.new_zeros(()))
    shape = (len(images) * NUM_REGIONS, levels[0].shape[1], REGION, REGION)
    regions = sum((level.mean() for level in levels), start=images.new_zeros(shape))
    scores, boxes = predictor(box_head(regions))
    return total + scores.square().mean() + boxes.square().mean()
