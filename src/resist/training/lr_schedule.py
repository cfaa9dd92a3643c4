"""Learning rates and the numbers of steps and evaluations of a run: pure functions of its options."""

import math

from resist.runs.config import OptimizationConfig


def num_steps(config: OptimizationConfig, images_per_epoch: int) -> int:
    """Number of optimizer steps of a run: enough for `epochs` passes."""
    return max(1, math.ceil(config.epochs * images_per_epoch / config.batch_size))


def evaluation_rounds(rounds: int, evaluations: int) -> set[int]:
    """Rounds, counted from 1, after which the full network is tested: spread evenly, including the last."""
    evaluations = min(evaluations, rounds)
    return {-(-rounds * number // evaluations) for number in range(1, evaluations + 1)}


def rate(config: OptimizationConfig, step: int, steps: int) -> float:
    """Learning rate of `step`, counted from 0, in a run of `steps` steps; `config.lr` has to be a number."""
    assert config.lr is not None  # `resist.training.optimizers.resolve` has filled it in
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "step":
        return config.lr * (1.0 if step < steps / 2 else 0.1 if step < 3 * steps / 4 else 0.01)
    if config.lr_schedule == "cosine":
        passed = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
        return config.lr * (1 + math.cos(math.pi * passed)) / 2
    return config.lr
