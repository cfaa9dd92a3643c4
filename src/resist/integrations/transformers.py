"""ResIST in Hugging Face's `Trainer`.

In a script that is started by torchrun, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50))
    with alone():                                     # accelerate must not join the processes, nor wrap the model
        arguments = TrainingArguments(folder, save_strategy="no", seed=job.workers[0].index)   # own batches for each
        Trainer(job.model, arguments, train_dataset=data, callbacks=[ResISTCallback(job)]).train()
    full = job.full_model(batches)                    # the full network in the process of worker 0; None in the others
    job.close()

On GPUs, start each process with its own CUDA_VISIBLE_DEVICES and give Job device="cuda"; of several visible GPUs,
Trainer would use all with DataParallel. All that Trainer does in a step works as usual: bf16, accumulated gradients,
clipping, schedulers, its optimizers. All processes must take the same number of steps, so give each the same number of
examples. transformers warns that it does not use the process group; this is intended.

Trainer evaluates and saves the sub-network; test and save `full` instead. The scale of its blocks is applied by hooks,
which `save_pretrained` does not save: fold it into the weights first, with `resist.export.fold_scale`.
"""

from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "resist.integrations.transformers needs transformers: pip install 'torch-resist[transformers]'"
    ) from error

from resist.errors import UserError
from resist.integrations import alone
from resist.job import Job

__all__ = ["ResISTCallback", "alone"]


class ResISTCallback(TrainerCallback):
    """Trainer callback that runs a job.

    It calls `job.step` after each optimizer step, and averages the last round when training ends.

    Args:
        job: The job whose network is trained.

    Raises:
        UserError: From `on_init_end`, if the Trainer spans several processes or devices.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                f"this Trainer spans {args.world_size} processes and {args.n_gpu} GPUs and averages gradients itself; "
                "create its TrainingArguments within resist.integrations.alone(), and let each process see one GPU"
            )

    on_train_begin = on_init_end  # for a callback that is added after the Trainer was created

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.step(given["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.finish()
