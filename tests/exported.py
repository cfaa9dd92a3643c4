"""Networks and inputs for the tests of export."""

import torch
from torch import Tensor, nn

from resist.models import build


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def own() -> nn.Module:
    """The network of the runs that are exported."""
    return build("preact_small", num_classes=10, depths=(1, 1, 5, 1), width=4).eval()
