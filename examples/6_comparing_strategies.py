"""Compare strategies, everything else equal: accuracy, seconds of compute, bytes sent. Digits, four workers.

    python examples/6_comparing_strategies.py

With one seed and a small network it shows how to compare, not which strategy is better. `resist compare` does the same
from the command line, with processes and repetitions.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import resist
from resist.data import Sampler, load
from resist.models import build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--local-steps", type=int, default=10)
options = parser.parse_args()
train, test = load("digits")
S, steps = 4, options.local_steps

strategies = {
    "resist": resist.resist(S, steps, min_depth=0),
    "resist, min_depth 4": resist.resist(S, steps, min_depth=4),
    "resist, momentum reset": resist.resist(S, steps, min_depth=0, optimizer_state="reset"),
    "local_sgd": resist.local_sgd(S, steps),
    "local_sgd, then resist": resist.switch(
        resist.local_sgd(S, steps), resist.resist(S, steps, min_depth=0), at_round=options.rounds // 4
    ),
    "diloco": resist.diloco(S, steps),
}


def accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).sum() for images, labels in test.batches(100)]
    return float(sum(right)) / len(test)


def run(strategy: resist.Strategy) -> tuple[float, float, float]:
    """Return accuracy of the full network, compute seconds of all workers, and MB sent with optimizer state."""
    example = next(test.batches(2)) if strategy is strategies["resist"] else False  # once: the network is the same
    job = resist.Job(lambda: build("preact_small", num_classes=10, width=8), strategy, example=example)
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1, momentum=0.9) for worker in job.workers]
    samplers = [Sampler(len(train), batch_size=32, seed=0, worker=index, workers=S) for index in range(S)]
    loaders = [train.loader(sampler) for sampler in samplers]
    seconds = 0.0
    for step in range(options.rounds * steps):
        begin = time.perf_counter()
        for worker, optimizer, loader in zip(job.workers, optimizers, loaders):
            images, labels = loader.batch(step)
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        job.step(*optimizers)
    sent = sum(n for traffic_kind, n in job.transport.take()["bytes"].items() if traffic_kind != "evaluate")
    full = job.full_model(loaders[0].batch(step)[0] for step in range(20))
    return accuracy(full), seconds, sent / 1e6


print(f"{S} workers, {options.rounds} rounds of {steps} steps\n\n{'':<24}{'accuracy':>10}{'compute':>10}{'sent':>11}")
for name, strategy in strategies.items():
    right, seconds, sent = run(strategy)
    print(f"{name:<24}{right:>10.1%}{seconds:>8.1f} s{sent:>8.1f} MB", flush=True)
