"""ResIST in Hugging Face's `Trainer`.

In a script that is started by torchrun, one process for each worker:

    job = resist.Job(build_model, resist.resist(workers=4, local_steps=50), example=batch)
    with alone():                                     # accelerate must not join the processes, nor wrap the model
        arguments = TrainingArguments(folder, eval_strategy="epoch", seed=job.workers[0].index)   # own batches for each
        trainer = Trainer(job.model, arguments, train_dataset=data, eval_dataset=held_out)
        trainer.add_callback(ResISTCallback(job, trainer))
        trainer.train()
    job.close()

    model = apply_scales(MyModel.from_pretrained(folder))        # later, anywhere

Where Trainer would evaluate or save (`eval_strategy`, `save_strategy`), the callback assembles the full network, which
ends the round, and does so with that one: the process of worker 0 evaluates it by `Trainer.evaluate`, the others wait
and get its scores; it is saved by `save_pretrained` in FOLDER/full-STEP, and at the end in FOLDER. Each process needs
the same arguments.

On GPUs, start each process with its own CUDA_VISIBLE_DEVICES and give Job device="cuda"; of several visible GPUs,
Trainer would use all with DataParallel. All that Trainer does in a step works as usual: bf16, accumulated gradients,
clipping, schedulers, its optimizers. All processes must take the same number of steps, so give each the same number of
examples. transformers warns that it does not use the process group; this is intended.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "resist.integrations.transformers needs transformers: pip install 'torch-resist[transformers]'"
    ) from error
from safetensors.torch import save_model

from resist.errors import UserError
from resist.export import scale_blocks
from resist.integrations import alone
from resist.integrations.full import Batches, assemble, plain
from resist.job import Job

__all__ = ["ResISTCallback", "alone", "apply_scales"]


def apply_scales(model: PreTrainedModel) -> PreTrainedModel:
    """Apply the scales of a saved full network that are not in its weights, but in its configuration; return it."""
    scale_blocks(model, getattr(model.config, "resist_scales", None) or {})
    return model


class ResISTCallback(TrainerCallback):
    """Trainer callback that runs a job, and evaluates and saves its full network.

    Args:
        job: The job whose network is trained.
        trainer: The Trainer that the callback is added to; needed for evaluations.
        batches: Makes training batches for BatchNorm's statistics, see `Job.full_model`. With them, the scale is folded
            into the weights where possible; else it is `resist_scales` of the saved configuration, see `apply_scales`.

    Raises:
        UserError: At the beginning, if the Trainer spans several processes or devices, or is to evaluate without being
            given, or to load its best checkpoint.
    """

    def __init__(self, job: Job, trainer: Trainer | None = None, batches: Batches | None = None) -> None:
        self.job, self.trainer, self.batches = job, trainer, batches

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                f"this Trainer spans {args.world_size} processes and {args.n_gpu} GPUs and averages gradients itself; "
                "create its TrainingArguments within resist.integrations.alone(), and let each process see one GPU"
            )
        if args.load_best_model_at_end:
            raise UserError("load_best_model_at_end=True would load a worker's sub-network; leave it out")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.on_init_end(args, state, control)  # for a callback that is added after the Trainer was created
        if args.eval_strategy != "no" and self.trainer is None:
            raise UserError(
                "Trainer would evaluate this worker's sub-network; give the callback the Trainer: "
                "trainer.add_callback(ResISTCallback(job, trainer)), or eval_strategy='no'"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.step(given["optimizer"])
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        evaluate, save = control.should_evaluate, control.should_save
        control.should_evaluate = control.should_save = False  # of the sub-network
        if not (evaluate or save):
            return
        full = assemble(self.job, self.batches)
        if evaluate:
            self._evaluate(full, state, control)
        if save and full is not None:
            self._save(full, Path(str(args.output_dir)) / f"full-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.job.finish()
        if args.save_strategy != "no" and (full := assemble(self.job, self.batches)) is not None:
            self._save(full, Path(str(args.output_dir)))

    def _evaluate(self, full: nn.Module | None, state: TrainerState, control: TrainerControl) -> None:
        """Evaluate the full network in the process of worker 0; the others take over scores and decisions."""
        answer: list[Any] = []
        if full is not None and self.trainer is not None:
            before = self.trainer.model, self.trainer.model_wrapped
            self.trainer.model = self.trainer.model_wrapped = full
            try:
                scores = self.trainer.evaluate()
            finally:
                self.trainer.model, self.trainer.model_wrapped = before
            answer = [scores, control.should_training_stop]
        texts = self.job.transport.all_gather_text(json.dumps(answer, default=float))  # waits for the evaluation
        scores, control.should_training_stop = next(found for text in texts if (found := json.loads(text)))
        if full is None:
            state.log_history.append({**scores, "step": state.global_step})

    def _save(self, full: nn.Module, folder: Path) -> None:
        network, scales = plain(full, self.batches)
        if isinstance(network, PreTrainedModel):
            if scales:
                network.config.resist_scales = scales
            network.save_pretrained(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(network, str(folder / "model.safetensors"), {"resist_scales": json.dumps(scales)})
