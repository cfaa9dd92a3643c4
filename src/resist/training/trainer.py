"""Optimizer steps of one worker, and the sampler of its images."""

import torch
from torch import Tensor

from resist.data import Sampler
from resist.runs.config import TrainConfig
from resist.sync.worker import Worker
from resist.tasks import Task


def make_sampler(config: TrainConfig, num_images: int, worker: int) -> Sampler:
    """Make the sampler of a worker.

    Args:
        config: The options of the run.
        num_images: Number of training images.
        worker: Number of the worker.

    Raises:
        UserError: The worker draws from fewer images than a batch has.
    """
    return Sampler(
        num_images,
        batch_size=config.optimization.batch_size,
        seed=config.run.seed,
        worker=worker,
        workers=config.method.workers,
        sampling=config.method.sampling,
    )


class Trainer:
    """Takes the optimizer steps of one worker.

    Args:
        config: The options of the run.
        worker: The worker, hosted by this process.
        task: Data and loss.
        sampler: The images of each batch.
    """

    def __init__(self, config: TrainConfig, worker: Worker, task: Task, sampler: Sampler) -> None:
        o = config.optimization
        self.index, self.sampler, self._task = worker.index, sampler, task
        self.optimizer = torch.optim.SGD(
            worker.model.parameters(), lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay
        )
        self._batches = task.batches(sampler)
        self._model = torch.compile(worker.model) if config.machine.compile else worker.model
        self._parts, self._bf16 = o.grad_accum_steps, config.machine.precision == "bf16"
        self._device = worker.subnet.device

    def step(self, step: int, lr: float) -> Tensor:
        """Take one optimizer step on the batch of `step`.

        Args:
            step: Number of the step, from 0.
            lr: Learning rate.

        Returns:
            Its mean loss, a scalar on the device.
        """
        total = torch.zeros((), device=self._device)
        for part in self._task.split(self._batches.batch(step), self._parts):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._task.loss(self._model, part) / self._parts
            loss.backward()
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
