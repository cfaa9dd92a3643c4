"""Running statistics of norm layers as means over batches, which several processes can estimate together."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from resist.blocks.modules import NORMS, Norm
from resist.errors import UserError


class Processes(Protocol):
    """The processes that estimate statistics together.

    Attributes:
        index: Number of this process.
        count: Number of processes.
    """

    index: int
    count: int

    def gather(self, action: Callable[[], Tensor]) -> list[Tensor]:
        """Return what an action makes in each process.

        Waits for all processes, and all fail if one does.

        Args:
            action: Makes the tensor of this process.

        Returns:
            The tensor of each process, in the order of the processes.

        Raises:
            AgreedError: In every process, if the action has raised UserError in one of them.
        """
        ...


def estimated(model: nn.Module) -> list[Norm]:
    """List the norms with running statistics.

    In a network in training, those in eval mode are frozen, and left out.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.running_mean is not None]
    return [norm for norm in norms if norm.training or not model.training]


class Estimate:
    """Estimate of the running statistics of norm layers: the mean over batches of what they compute of each.

    The statistics of a batch are a row: the number of the batch, how often it has passed through each layer, then the
    mean and the variance of the layers one after another. In double precision, which keeps all of them exactly.

    Args:
        layers: The layers, in train mode. Their running statistics are reset.
        device: Their device.
    """

    def __init__(self, layers: Sequence[Norm], device: torch.device) -> None:
        self._layers, self._calls = layers, [0] * len(layers)
        self._statistics: list[Tensor] = []
        for layer in layers:
            layer.reset_running_stats()
            self._statistics += [cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)]
        self._lengths = torch.tensor([len(statistic) for statistic in self._statistics], device=device).long()
        size = 1 + len(layers) + int(self._lengths.sum())
        self.nothing = torch.full((size,), -1.0, dtype=torch.float64, device=device)  # a row that is no batch

    @contextmanager
    def batch(self) -> Generator[None]:
        """Pass a batch through the network within this context, so that the layers compute its statistics."""
        self._calls = [0] * len(self._layers)
        momenta = [layer.momentum for layer in self._layers]

        def count(place: int) -> Callable[[nn.Module, object], None]:
            def hook(layer: nn.Module, _: object) -> None:
                self._calls[place] += 1
                cast(Norm, layer).momentum = 1 / self._calls[place]  # the mean over the calls in this batch

            return hook

        hooks = [layer.register_forward_pre_hook(count(place)) for place, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, momentum in zip(self._layers, momenta, strict=True):
                layer.momentum = momentum

    def row(self, number: int) -> Tensor:
        """Return the statistics of the batch that has passed last.

        Args:
            number: Number of the batch, from 0.
        """
        row = torch.tensor([number, *self._calls], dtype=torch.float64, device=self.nothing.device)
        return torch.cat([row, *(statistic.double() for statistic in self._statistics)])

    def fill(self, rows: Iterable[Tensor]) -> None:
        """Set the running statistics to the mean over batches; a layer counts those that have passed through it.

        Args:
            rows: The row of each batch, summed in this order.

        Raises:
            UserError: If there are none.
        """
        num, batches = 0, torch.zeros_like(self.nothing[1 : 1 + len(self._layers)])
        calls, total = torch.zeros_like(batches), torch.zeros_like(self.nothing[1 + len(self._layers) :])
        for row in rows:
            if row[0] < 0:
                continue
            own = row[1 : 1 + len(self._layers)]
            num, batches, calls = num + 1, batches + (own > 0), calls + own
            passed = (own > 0).repeat_interleave(2).repeat_interleave(self._lengths)
            total += torch.where(passed, row[1 + len(self._layers) :], 0.0)
        if not num:
            raise UserError("full_model got no batches (an iterator that is used up?); give some training batches")
        for layer in self._layers:
            layer.reset_running_stats()
        end = 0
        for number, statistic in enumerate(self._statistics):
            end += len(statistic)
            if used := float(batches[number // 2]):  # two statistics for each layer
                statistic.copy_(total[end - len(statistic) : end] / used)
        for layer, count in zip(self._layers, calls, strict=True):
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(int(count))
