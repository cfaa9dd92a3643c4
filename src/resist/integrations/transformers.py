"""ResIST in Hugging Face's `Trainer`. In a script that torchrun starts, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50))
    with alone():                                     # accelerate must not join the processes, nor wrap the model
        arguments = TrainingArguments(folder, save_strategy="no", seed=job.workers[0].index)   # own batches for each
        Trainer(job.model, arguments, train_dataset=data, callbacks=[ResISTCallback(job)]).train()
    full = job.full_model(batches)                    # the whole network; None but in the process of worker 0
    job.close()

On GPUs start each process with its own CUDA_VISIBLE_DEVICES and give Job device="cuda": of several GPUs that it sees,
Trainer would use all by DataParallel. Everything that it does in a step stays: bf16, accumulated gradients, clipping,
schedulers, its optimizers. All processes take the same number of steps: give each as many examples. transformers warns
that it does not use the process group, which is as it should be.

What it evaluates and saves by itself is the sub-network: test and save `full`. The scale of its blocks is a hook, which
`save_pretrained` does not keep: put it into the weights first, with `resist.export.fold_scale`.
"""

from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "resist.integrations.transformers needs transformers: pip install 'resist[transformers]'"
    ) from error

from resist.errors import UserError
from resist.integrations import alone
from resist.job import Job

__all__ = ["ResISTCallback", "alone"]


class ResISTCallback(TrainerCallback):
    """Calls `job.step` after each optimizer step, and folds the last round when training ends.

    Raises UserError where the Trainer spans several processes or devices.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                f"this Trainer spans {args.world_size} processes and {args.n_gpu} GPUs and averages gradients itself; "
                "make its TrainingArguments within resist.integrations.alone(), and let each process see one GPU"
            )

    on_train_begin = on_init_end  # for a callback that was added later

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.step(given["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.finish()
