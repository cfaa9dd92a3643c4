"""Faster R-CNN on a feature pyramid over a pre-activation ResNet: torchvision's detector, our backbone.

    backbone.body       stem, layer1 .. layer4 as in classification, without its head
    backbone.norms      norm and ReLU of each section's output, since a pre-activation network leaves it as a bare sum
    backbone.fpn        feature pyramid over the sections from stride 4 on, and a further level by sub-sampling
    rpn, roi_heads      region proposals, and the class and box of each

The blocks of `backbone.body.layer3` are the chain; everything behind the backbone is shared. Only the backbone has
BatchNorm. Neck and heads are as wide as the backbone: 256 and 1,024 channels, torchvision's own, where its last section
has 512 or more.

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
# Pixels of photographs in 0..1, by channel, over ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Side of the square regions that are cut out of a level, and how many the heads see of an image in training: as many as
# Fast R-CNN, since the 512 that are usual with pyramids take more time than a small backbone.
REGION, NUM_REGIONS = 7, 128


class Detector(FasterRCNN):
    """images: list of (3, height, width) float32 in 0..1, of any sizes. In eval mode a list with `boxes` (found, 4) in
    pixels, `labels` (found,) and `scores` (found,) of each image; in train mode, with `targets` (a list with `boxes`
    and `labels` of each image), the losses by name.

    A tensor (batch, 3, height, width), already normalized, is taken for images whose features alone are of interest,
    as when BatchNorm statistics are estimated: the pyramid's levels by name.
    """

    def forward(  # type: ignore[override]
        self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> Mapping[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(images, Tensor):
            return self.backbone(images)
        result: Any = super().forward(images, targets)
        return result


class Pyramid(nn.Module):
    """Normalized images (batch, 3, height, width) -> levels by name, each (batch, out_channels, height, width) float32.

    strides: of the levels, in pixels.
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
    """In float32 whatever autocast says: boxes in bfloat16 would be whole numbers of several pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in deltas]


class Predictor(FastRCNNPredictor):
    """In float32, likewise."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


def build_detector(body: nn.Module, num_classes: int, image_size: int, max_size: int) -> Detector:
    """A detector of `num_classes` classes, and of background as class 0.

    body: a network with sections `layer1` .. `layer4`, and `forward_stem`, which gives what the first of them is given;
          its head is taken off.
    image_size, max_size: what images are brought to inside it, see `image_transform`.
    Raises UserError where the body is not such a network.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes} has to be at least 1")
    backbone = Pyramid(headless(body))
    width = backbone.out_channels
    # Two anchor sizes a level, half an octave apart, up to 8 strides, which is torchvision's only one.
    sizes = tuple((round(4 * 2**0.5 * stride), 8 * stride) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return Detector(
        backbone,
        min_size=image_size,
        max_size=max_size,
        image_mean=MEAN,
        image_std=STD,
        rpn_anchor_generator=anchors,
        rpn_head=ProposalHead(width, anchors.num_anchors_per_location()[0]),
        box_roi_pool=MultiScaleRoIAlign(list(backbone.norms), REGION, sampling_ratio=2),
        box_head=TwoMLPHead(width * REGION**2, 4 * width),
        box_predictor=Predictor(4 * width, num_classes + 1),
        box_batch_size_per_image=NUM_REGIONS,
    )


def image_transform(image_size: int, max_size: int) -> GeneralizedRCNNTransform:
    """What a detector does to images first: normalize, bring the shorter side to image_size (the longer one to at most
    max_size), and put them into one tensor with zeros around them."""
    return GeneralizedRCNNTransform(image_size, max_size, list(MEAN), list(STD))


def headless(body: nn.Module) -> nn.Module:
    """The body of a classification network: its last norm and its head are replaced by nothing."""
    missing = [name for name in ("forward_stem", *SECTIONS) if not hasattr(body, name)]
    if missing:
        raise UserError(
            f"detection needs a network with forward_stem and layer1 .. layer4, as our pre-activation ResNets have; "
            f"{type(body).__name__} has no {missing[0]}"
        )
    for name in ("norm", "head"):
        if name in body._modules:
            setattr(body, name, nn.Identity())
    return body


def sections(body: Any, images: Tensor) -> list[tuple[str, Tensor]]:
    """The output of each section, by name."""
    x, found = body.forward_stem(images), []
    for name in SECTIONS:
        x = body.get_submodule(name)(x)
        found.append((name, x))
    return found


def section_shapes(body: nn.Module) -> dict[str, tuple[int, int]]:
    """(channels, stride in pixels) of each section, found without weights."""
    size = 64
    images = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        outputs = sections(copy.deepcopy(body).to("meta").eval(), images)
    return {name: (x.shape[1], size // x.shape[2]) for name, x in outputs}


def dense_pass(model: nn.Module, images: Tensor) -> Tensor:
    """A scalar that depends on all weights of a detector, for counting operations on the meta device.

    Which regions there are depends on weights, so they stand for themselves: NUM_REGIONS of each image. The choice of
    regions (sorting, suppression) and their cutting out are left out; convolutions and matrix products are all there.
    """
    assert isinstance(model, Detector)
    proposals, box_head, predictor = model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor
    assert isinstance(proposals, ProposalHead)
    assert isinstance(box_head, TwoMLPHead)
    assert isinstance(predictor, Predictor)
    levels = list(model.backbone(images).values())
    logits, deltas = proposals(levels)
    total = sum((one.square().mean() for one in (*logits, *deltas)), start=images.new_zeros(()))
    shape = (len(images) * NUM_REGIONS, levels[0].shape[1], REGION, REGION)
    regions = sum((level.mean() for level in levels), start=images.new_zeros(shape))
    scores, boxes = predictor(box_head(regions))
    return total + scores.square().mean() + boxes.square().mean()
