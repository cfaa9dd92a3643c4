"""Training steps of wire.py: real ones, or sleep of a given length."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from competitors import Build, Ddp, Method
from own import momentum_sgd
from resist.job import Job
from resist.planning.strategy import resist
from resist.sync.local import Local


def compare_steps(build: Build, workers: int, batch: int, num_classes: int, repetitions: int = 3) -> float:
    """Return the processor time of a step of a sub-network of ResIST, as a share of one of the full network."""
    job = Job(build, resist(workers), batchnorm="batch", transport=Local(workers), example=False)
    networks = {"sub": job.workers[0].model, "full": build()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(num_classes, (batch,))
    optimizers = {name: momentum_sgd(network) for name, network in networks.items()}
    for number in range(-1, repetitions):  # one to warm up
        for name, network in networks.items():
            start = time.process_time()
            F.cross_entropy(network(images), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    sub, full = (statistics.median(some) for some in seconds.values())
    return sub / full


class Steps:
    """Training steps: real ones, or sleep. `exchanging`: with DDP, which averages gradients."""

    def __init__(self, method: Method, args: argparse.Namespace, exchanging: bool) -> None:
        self.method, self.seconds = method, 0.0
        if args.compute_s:
            self.seconds = args.compute_s[0 if method.name.startswith("resist") else 1]
        self.images = torch.randn(args.batch, 3, 32, 32)
        self.labels = torch.randint(args.num_classes, (args.batch,))
        self.model = Sleeping(method.model, self.seconds) if self.seconds else method.model
        self.exchanging = exchanging
        if exchanging:
            assert isinstance(method, Ddp)
            self.model = method.wrap(self.model)

    def run(self, steps: int, after: Callable[[], None] = lambda: None) -> list[float]:
        """Return the seconds of each step, with what is called after it: after all but the last one."""
        seconds: list[float] = []
        for number in range(steps):
            start = time.perf_counter()
            self._step()
            if number < steps - 1:
                after()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _step(self) -> None:
        if self.seconds and not self.exchanging:
            time.sleep(self.seconds)
            return
        if not self.seconds:
            self.method.optimizer.zero_grad()
        output = self.model(self.images)
        if self.seconds:
            output.sum().backward()  # zero gradients and no step: weights stay; the step is in `seconds`
            return
        F.cross_entropy(output, self.labels).backward()
        self.method.optimizer.step()  # keep gradients: torch's averager skips parameters without


class Sleeping(nn.Module):
    """The layers of `model`, which sleep instead of computing: a third of `seconds` forward, the rest backward."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = model, seconds
        self.layers = [layer for module in model.modules() if (layer := list(module.parameters(recurse=False)))]

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds / 3)
        clock = [0.0]
        x = images.new_zeros(1)
        for layer in self.layers:
            x = Layer.apply(x, clock, self.seconds * 2 / 3 / len(self.layers), *layer)
        return x


class Layer(torch.autograd.Function):
    """Identity. Its backward pass sleeps until `seconds` after the previous layer's, and returns zero gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: list[float], seconds: float, *parameters: Tensor) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        ctx.save_for_backward(*parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        clock = ctx.clock
        clock[0] = (clock[0] or time.perf_counter()) + ctx.seconds
        time.sleep(max(0.0, clock[0] - time.perf_counter()))
        return gradient, None, None, *(p.new_zeros(()).expand(p.shape) for p in ctx.saved_tensors)
