"""ResIST in a Lightning `Trainer`. In a script that torchrun starts, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50))
    module = MyModule(job.model)                   # a LightningModule around this worker's sub-network
    trainer = Trainer(devices=1, callbacks=[ResIST(job)], enable_checkpointing=False, use_distributed_sampler=False)
    trainer.fit(module, loader)                    # the loader of this worker: job.workers[0].index says which
    full = job.full_model(batches)                 # the whole network; None but in the process of worker 0
    job.close()

One device, no `strategy`: so Lightning neither joins the processes nor averages gradients. Each of them is the first
for Lightning; give loggers to one only. On GPUs give Job the device that the Trainer takes:
Job(..., device=f"cuda:{local_rank}") and Trainer(accelerator="gpu", devices=[local_rank]).

Everything that Lightning does in a step stays: precision, accumulated gradients, clipping, schedulers. All processes
take the same number of steps. What it validates is the sub-network: test `job.full_model(batches)` instead, between
two fits or in a callback of your own; all processes have to call it. Its checkpoints would hold the sub-network, too.
"""

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("resist.integrations.lightning needs Lightning: pip install 'resist[lightning]'") from error

from resist.errors import UserError
from resist.job import Job


class ResIST(Callback):
    """Calls `job.step` after each optimizer step, and folds the last round when training ends.

    Raises UserError where the Trainer spans several processes.
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
        # It counts optimizer steps, those that a GradScaler leaves out too: a batch may come to none, or to several.
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.job.step(*trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.job.finish()
