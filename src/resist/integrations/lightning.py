"""ResIST in a Lightning `Trainer`.

In a script that is started by torchrun, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50))
    module = MyModule(job.model)                   # a LightningModule around this worker's sub-network
    trainer = Trainer(devices=1, callbacks=[ResIST(job)], enable_checkpointing=False, use_distributed_sampler=False)
    trainer.fit(module, loader)                    # the loader of this worker, number job.workers[0].index
    full = job.full_model(batches)                 # the full network in the process of worker 0; None in the others
    job.close()

With one device and no `strategy`, Lightning neither joins the processes nor averages gradients. Lightning takes every
process for the first one; give loggers to one process only. On GPUs, `Job` and `Trainer` need the same device:
Job(..., device=f"cuda:{local_rank}") and Trainer(accelerator="gpu", devices=[local_rank]).

All that Lightning does in a step works as usual: precision, accumulated gradients, clipping, schedulers. All processes
must take the same number of steps. Lightning validates and saves the sub-network; to test the full network, call
`job.full_model(batches)` in all processes, between two fits or in a callback of your own.
"""

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("resist.integrations.lightning needs Lightning: pip install 'torch-resist[lightning]'") from error

from resist.errors import UserError
from resist.job import Job


class ResIST(Callback):
    """Lightning callback that runs a job.

    It calls `job.step` after each optimizer step, and averages the last round when training ends.

    Args:
        job: The job whose network is trained.

    Raises:
        UserError: From `setup`, if the Trainer spans several processes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size != 1:
            raise UserError(
                f"this Trainer spans {trainer.world_size} processes and averages gradients itself; "
                "give it devices=1 and no strategy, in each process"
            )

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
