"""ResIST in a Lightning `Trainer`.

In a script that is started by torchrun, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50), example=batch)
    module = MyModule(job.model)                   # a LightningModule around this worker's sub-network
    callback = ResIST(job, batches=lambda: some_training_batches, save_to="full.ckpt")
    trainer = Trainer(devices=1, callbacks=[callback], enable_checkpointing=False, use_distributed_sampler=False)
    trainer.fit(module, loader, val_loader)        # the loader of this worker, number job.workers[0].index
    job.close()

    module = MyModule.load_from_checkpoint("full.ckpt", net=build_model())        # later, anywhere

With one device and no `strategy`, Lightning neither joins the processes nor averages gradients. Lightning takes every
process for the first one; give loggers to one process only. On GPUs, `Job` and `Trainer` need the same device:
Job(..., device=f"cuda:{local_rank}") and Trainer(accelerator="gpu", devices=[local_rank]).

Validation, test and prediction use the full network: the callback assembles it in every process, which sends it once to
each, and puts it in the place of the sub-network meanwhile. Give all processes the same validation data and `batches`:
then they find the same scores, so early stopping and schedulers decide the same everywhere. An evaluation ends the
round. All that Lightning does in a step works as usual: precision, accumulated gradients, clipping, schedulers. All
processes must take the same number of steps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    import lightning
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("resist.integrations.lightning needs Lightning: pip install 'torch-resist[lightning]'") from error

from resist.errors import UserError
from resist.integrations.full import Batches, assemble, plain
from resist.job import Job


class ResIST(Callback):
    """Lightning callback that runs a job, and evaluates and saves its full network.

    Args:
        job: The job whose network is trained.
        batches: Makes training batches for BatchNorm's statistics, see `Job.full_model`; the same in all processes.
        save_to: File for the module with the full network at the end of training, for `load_from_checkpoint`. The scale
            is in the weights; where it cannot be, it is the entry "scales" of the file, and a warning says so.

    Raises:
        UserError: From `setup`, if the Trainer spans several processes, saves the sub-network, or trains another one.
    """

    def __init__(self, job: Job, batches: Batches | None = None, save_to: Path | str | None = None) -> None:
        self.job, self.batches, self.save_to = job, batches, save_to
        self._steps = 0
        self._replaced: list[tuple[nn.Module, str, nn.Module | None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size != 1:
            raise UserError(
                f"this Trainer spans {trainer.world_size} processes and averages gradients itself; "
                "give it devices=1 and no strategy, in each process"
            )
        if trainer.checkpoint_callbacks:
            name = type(trainer.checkpoint_callbacks[0]).__name__
            raise UserError(
                f"{name} would save this worker's sub-network; give Trainer enable_checkpointing=False, and the "
                "callback save_to=FILE"
            )
        if not list(_places(pl_module, self.job.model)):
            raise UserError("the LightningModule does not have job.model as an attribute; build it around job.model")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # global_step counts optimizer steps, also those that a GradScaler skips; a batch may cause none or several.
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.job.step(*trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.job.finish()
        if self.save_to is None:
            return
        full = assemble(self.job, self.batches)
        if full is not None:
            network, scales = plain(full, self.batches)
            self._replace(pl_module, network)
            content: dict[str, Any] = {"state_dict": pl_module.state_dict(), "scales": scales}
            torch.save({**content, "pytorch-lightning_version": lightning.__version__}, self.save_to)
            self._put_back()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        full = assemble(self.job, self.batches, everywhere=True)
        assert full is not None  # this process hosts a worker
        self._replace(pl_module, full)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()

    def _replace(self, module: nn.Module, network: nn.Module) -> None:
        self._replaced = list(_places(module, self.job.model))
        for parent, name, _ in self._replaced:
            parent._modules[name] = network

    def _put_back(self) -> None:
        for parent, name, child in self._replaced:
            parent._modules[name] = child
        self._replaced = []


def _places(module: nn.Module, network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
    """Find the attributes that hold a network, also where it is compiled: owner, name and present value."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if name != "_orig_mod" and network in (child, getattr(child, "_orig_mod", None)):
                yield parent, name, child
