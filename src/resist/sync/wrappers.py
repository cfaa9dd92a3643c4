"""Wrappers of torch around a sub-network that would average or shard it over all processes."""

import gc
from collections.abc import Iterable

from torch import nn

from resist.errors import UserError

# By name: only `resist.sync.distributed` imports torch.distributed.
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_unwrapped(models: Iterable[nn.Module]) -> None:
    """Check that no wrapper joins a sub-network with those of other workers, which hold other blocks.

    Looks at all objects of the process once, some hundredths of a second.

    Args:
        models: The sub-networks of the hosted workers.

    Raises:
        UserError: A wrapper holds one of them, or its parameters are sharded.
    """
    networks = {id(model): model for model in models}
    for model in networks.values():
        if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
            raise UserError(_refusal("fully_shard"))
    for found in gc.get_objects():
        name = type(found).__name__
        if name in WRAPPERS and isinstance(found, nn.Module) and any(id(m) in networks for m in found.modules()):
            raise UserError(_refusal(name))


def _refusal(name: str) -> str:
    return (
        f"{name} around the network of a worker would mix it with those of other workers, which hold other blocks; use "
        "job.model itself, and resist.ddp or resist.local_sgd to train the full network on each worker"
    )
