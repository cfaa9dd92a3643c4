"""Pre-activation ResNets of bottleneck blocks: the paper's ImageNet networks.

    stem conv7x7 / 2, max pool / 2 -> layer1 .. layer4 (4w, 8w, 16w, 32w channels; the last three halve the image)
    -> norm, ReLU -> mean pool -> linear head

They equal timm's resnetv2_50, resnetv2_101 and resnetv2_152 layer for layer; `resist.models.pretrained` translates the
names of the weights. `layer3` is the long section; the network with 200 layers has a second one, `layer2`.

He et al., "Identity Mappings in Deep Residual Networks", 2016; Dun et al., "ResIST", 2022.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_DEPTHS = {
    "preact_resnet50_imagenet": (3, 4, 6, 3),
    "preact_resnet101_imagenet": (3, 4, 23, 3),
    "preact_resnet152_imagenet": (3, 8, 36, 3),
    "preact_resnet200_imagenet": (3, 24, 36, 3),
}
# Channels of a block's output, relative to those of its 3x3 convolution.
EXPANSION = 4


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck block: x + conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(relu(norm(x))))))))).

    Where the shape changes, the skip connection is a 1x1 convolution of relu(norm(x)).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolution; the output has `EXPANSION` times as many.
        stride: Stride of the 3x3 convolution and of the skip connection.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.norm2(self.conv1(out)))
        return skip + self.conv3(F.relu(self.norm3(self.conv2(out))))


class PreActResNetImageNet(nn.Module):
    """Pre-activation ResNet of bottleneck blocks for photographs.

    It maps images (batch, in_channels, height, width), of any height and width from 32 up, to logits
    (batch, num_classes).

    Args:
        depths: Number of blocks in each of the four sections.
        num_classes: Number of logits.
        width: Channels of the stem; the first section's output has four times as many.
        in_channels: Channels of the images.
        zero_init: The blocks of `layer3` after the first begin as the identity: their last convolution is zero.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        in_channels: int = 3,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.layer1 = _section(width, width, depths[0], stride=1)
        self.layer2 = _section(4 * width, 2 * width, depths[1], stride=2)
        self.layer3 = _section(8 * width, 4 * width, depths[2], stride=2)
        self.layer4 = _section(16 * width, 8 * width, depths[3], stride=2)
        self.norm = nn.BatchNorm2d(32 * width)
        self.head = nn.Linear(32 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for block in self.layer3[1:] if zero_init else ():
            nn.init.zeros_(block.get_parameter("conv3.weight"))

    def forward_stem(self, images: Tensor) -> Tensor:
        """Return the input of the first section, at a quarter of the resolution."""
        return F.max_pool2d(self.stem(images), 3, 2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.forward_stem(images)))))
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))


def _section(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    rest = [PreActBottleneck(EXPANSION * channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(PreActBottleneck(in_channels, channels, stride), *rest)
