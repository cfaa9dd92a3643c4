"""Run directories as training leaves them, made by code: their plans and bytes are real, their losses are not."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from resist.planning.plan import RoundPlan, partition
from resist.planning.schedule import allreduce_bytes, schedule
from resist.runs.config import MethodConfig, NetworkConfig, RunConfig, TrainConfig

CHAIN, BLOCK_BYTES, SHARED_BYTES = "layer3:1-22", 4_722_688, 61_688_464


def make_run(
    path: Path, *, rounds: int = 40, workers: int = 4, blocks: int = 22, capacity: int = 6, strategy: str = "resist",
    seed: int = 0, num_evals: int = 8, distinct: int = 10_000,
) -> Path:  # fmt: skip
    """distinct: rounds after which the plans come again, to save the time of drawing them."""
    path.mkdir(parents=True)
    method = MethodConfig(strategy=strategy, workers=workers)  # type: ignore[arg-type]
    config = TrainConfig(NetworkConfig(data="cifar10", model="preact_resnet101"), method, run=RunConfig(path, seed))
    capacities = (capacity if strategy == "resist" else blocks,) * workers
    drawn = min(rounds, distinct)
    plans = [RoundPlan((partition(blocks, capacities, seed=seed, round=i, chain=CHAIN),)) for i in range(drawn + 1)]
    sent: list[dict[tuple[int, int], int]] = []
    for now, then in pairwise(plans):
        pairs: dict[tuple[int, int], int] = {}
        for message in schedule(now, then, [BLOCK_BYTES]).messages:
            key = (message.source, message.target)
            pairs[key] = pairs.get(key, 0) + message.num_bytes
        sent.append(pairs)
    lines: list[str] = []
    for i in range(rounds):
        held = plans[i % len(sent)].plans[0].blocks
        lines.append(json.dumps(record(i, rounds, held, sent[i % len(sent)], capacity / blocks, num_evals)))
    (path / "config.json").write_text(json.dumps(config.to_json()))
    (path / "environment.json").write_text(json.dumps({
        "started": "2026-01-02T03:04:05+00:00", "command": ["resist", "train"], "resist": "0.1.0", "commit": "abc1234",
        "torch": "2.14", "python": "3.11", "processor": "a processor", "cores": 2, "gpus": [],
    }))  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (path / "model.safetensors").write_text("")
    return path


def record(
    i: int, rounds: int, plan: tuple[tuple[int, ...], ...], pairs: dict[tuple[int, int], int], share: float, times: int
) -> dict[str, Any]:
    workers, wave = len(plan), 0.05 * math.sin(1.7 * i)
    full = all(len(held) == len(plan[0]) == max(plan[0]) + 1 for held in plan)
    tested = (i + 1) * times // rounds > i * times // rounds
    loss = 2.3 * math.exp(-4 * (i + 1) / rounds) + 0.1 + wave / 2
    compute = (1.0 if full else 0.45 + 0.5 * share) + wave
    return {
        "round": i + 1, "step": 50 * (i + 1), "epoch": (i + 1) / 8, "lr": 0.03,
        "accuracy": round(0.93 - 0.8 * math.exp(-5 * (i + 1) / rounds) + wave / 20, 4) if tested else None,
        "images": 50 * 128 * workers,
        "seconds": {"compute": compute, "wait": 0.04 + wave / 2, "sync": 0.4 if full else 0.15, "checkpoint": 0.01,
                    "evaluate": 0.8 if tested else 0.0},
        "loss": loss,
        "bytes": {"shared": workers * allreduce_bytes(SHARED_BYTES * (3 if full else 1), workers),
                  "blocks": sum(pairs.values())},
        "messages": {"shared": 1, "blocks": len(pairs)}, "wire_bytes": {}, "wait_s": {},
        "pairs": [[a, b, n] for (a, b), n in sorted(pairs.items())],
        "capacity": {CHAIN: [len(held) for held in plan]}, "plan": {CHAIN: plan},
        "workers": [
            {"worker": w, "loss": loss + 0.03 * w, "compute_s": compute * (1 - 0.02 * w)} for w in range(workers)
        ],
        **({"startup_s": 6.5, "evaluation": {"by": "all", "reason": "2 processes compute at once"}} if i == 0 else {}),
        "weights": {"all": 41_400_000, "largest": round(41_400_000 * (1 if full else share)),
                    "local_sgd_bytes": workers * allreduce_bytes(3 * SHARED_BYTES, workers)},
    }  # fmt: skip
