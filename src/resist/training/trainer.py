"""Optimizer steps of one worker, and the sampler of its images."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.data import Sampler
from resist.runs.config import TrainConfig
from resist.subnet.batchnorm import refusing_one_value
from resist.sync.worker import Worker
from resist.tasks import Task
from resist.training.device import autocast
from resist.training.optimizers import build_optimizer, resolve


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

    Attributes:
        average: The average of the weights (EMA), if the options ask for one; `Job.follow` moves it with its blocks.
    """

    def __init__(self, config: TrainConfig, worker: Worker, task: Task, sampler: Sampler) -> None:
        o = resolve(config.optimization)
        self.index, self.sampler, self._task = worker.index, sampler, task
        self.optimizer = build_optimizer(o, worker.model)
        self.average = None if o.model_ema_decay is None else start_average(worker.subnet.model, o.model_ema_decay)
        self._network, self._clip_norm = worker.subnet.model, o.clip_grad_norm
        self._batches = task.batches(sampler)
        self._model = torch.compile(worker.model) if config.machine.compile else worker.model
        self._parts, self._precision = o.grad_accum_steps, config.machine.precision
        self._device = worker.subnet.device
        self._sizes = f"`batch_size={o.batch_size}`, `grad_accum_steps={o.grad_accum_steps}`"

    def deal(self, index: int, sampler: Sampler) -> None:
        """Go on as a worker of another number, with its images.

        Args:
            index: The number.
            sampler: The images of each batch.
        """
        self.index, self.sampler = index, sampler
        self._batches = self._task.batches(sampler)

    def step(self, step: int, lr: float) -> Tensor:
        """Take one optimizer step on the batch of `step`. Does not wait for the device.

        Args:
            step: Number of the step, from 0.
            lr: Learning rate.

        Returns:
            Its mean loss, a scalar on the device.
        """
        total = torch.zeros((), device=self._device)
        for part in self._task.split(self._batches.batch(step), self._parts):
            with autocast(self._device, self._precision), self._two_values():
                loss = self._task.loss(self._model, part) / self._parts
            loss.backward()
            total += loss.detach()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            update_average(self.average, self._network)
        return total

    def _two_values(self) -> AbstractContextManager[None]:
        return refusing_one_value(self._network, f"{self._sizes}: give parts of at least two images")


def start_average(model: nn.Module, decay: float) -> AveragedModel:
    """Begin an exponential moving average of the weights, from what they are now.

    Its buffers are those of the network at each step: statistics of BatchNorm have to be estimated again.

    Args:
        model: The network of a worker.
        decay: Weight of the average in each step; that of the new weights is 1 - decay.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.n_averaged.fill_(1)  # so the first step is averaged as all others are, also after a resume
    return average


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Move an average on by the weights of a step, and copy the buffers.

    It is `average.update_parameters(model)` without the copy of the count to the device, which waits for it.

    Args:
        average: An average that `start_average` has begun.
        model: The network.
    """
    assert average.multi_avg_fn is not None
    average.multi_avg_fn(list(average.parameters()), list(model.parameters()), average.n_averaged)
    for own, new in zip(average.module.buffers(), model.buffers(), strict=True):
        own.copy_(new)
    average.n_averaged += 1
