"""Pre-activation ResNets of basic blocks: the paper's CIFAR networks.

    stem conv3x3 -> layer1 .. layer4 (widths w, 2w, 4w, 8w; the last three halve the image) -> mean pool -> linear head

There is no norm or pooling in the stem, and by default no norm or ReLU before the mean pool. `layer3` is the long
section whose blocks 1, 2, ... form the chain; its block 0 changes the shape.

He et al., "Identity Mappings in Deep Residual Networks", 2016; Dun et al., "ResIST", 2022.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {
    "preact_resnet101": (3, 4, 23, 3),
    "preact_resnet152": (3, 4, 36, 3),
    "preact_resnet200": (3, 4, 50, 3),
}


class PreActBlock(nn.Module):
    """Pre-activation basic block: x + conv(relu(norm(conv(relu(norm(x)))))).

    Where the shape changes, the skip connection is a 1x1 convolution of relu(norm(x)).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution and of the skip connection.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(out))))


class PreActResNet(nn.Module):
    """Pre-activation ResNet of basic blocks for small images.

    It maps images (batch, in_channels, height, width), of any height and width from 8 up, to logits
    (batch, num_classes).

    Args:
        depths: Number of blocks in each of the four sections.
        num_classes: Number of logits.
        width: Channels of the stem and of the first section.
        in_channels: Channels of the images.
        final_norm: Apply a norm and a ReLU before the mean pool.
        zero_init: The blocks of `layer3` after the first begin as the identity: their last convolution is zero.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        in_channels: int = 3,
        final_norm: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _section(width, width, depths[0], stride=1)
        self.layer2 = _section(width, 2 * width, depths[1], stride=2)
        self.layer3 = _section(2 * width, 4 * width, depths[2], stride=2)
        self.layer4 = _section(4 * width, 8 * width, depths[3], stride=2)
        self.norm = nn.BatchNorm2d(8 * width) if final_norm else None
        self.head = nn.Linear(8 * width, num_classes)
        for block in self.layer3[1:] if zero_init else ():
            nn.init.zeros_(block.get_parameter("conv2.weight"))

    def forward_stem(self, images: Tensor) -> Tensor:
        """Return the input of the first section."""
        return self.stem(images)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.forward_stem(images)))))
        if self.norm is not None:
            x = F.relu(self.norm(x))
        return self.head(x.mean(dim=(2, 3)))


def _section(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    rest = [PreActBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(PreActBlock(in_channels, channels, stride), *rest)
