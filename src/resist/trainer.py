"""One hosted worker as the command line trains it: its network, its optimizer and its batches."""

import torch
from torch import Tensor

from resist.config import TrainConfig
from resist.tasks import Task
from resist.worker import Worker


class Trainer:
    """Takes the optimizer steps of one worker."""

    def __init__(self, config: TrainConfig, worker: Worker, task: Task) -> None:
        o = config.optimisation
        self.index, self._task = worker.index, task
        self.optimizer = torch.optim.SGD(
            worker.model.parameters(), lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay
        )
        self.batches = task.batches(
            batch_size=o.batch_size,
            seed=config.run.seed,
            worker=worker.index,
            workers=config.method.workers,
            sampling=config.method.sampling,
        )
        self._model = torch.compile(worker.model) if config.machine.compile else worker.model
        self._parts, self._bf16 = o.accumulate, config.machine.precision == "bf16"
        self._device = worker.subnet.device

    def step(self, step: int, lr: float) -> Tensor:
        """One optimizer step on the batch that belongs to `step`. Returns its mean loss, a scalar on the device."""
        total = torch.zeros((), device=self._device)
        for part in self._task.split(self.batches.batch(step), self._parts):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._task.loss(self._model, part) / self._parts
            loss.backward()
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
