"""Unequal workers: a slow machine gets fewer blocks, so that the others do not wait. The machines are emulated.

    python examples/5_unequal_workers.py --speeds 1 0.6 0.4

All steps run and are timed in this process; their times are divided by the speed of the worker's emulated machine.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import resist
from resist.data import Sampler, load
from resist.models import build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.6, 0.4])
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--local-steps", type=int, default=5)
options = parser.parse_args()
workers = len(options.speeds)
train, _ = load("digits")


def network() -> torch.nn.Module:
    return build("preact_small", num_classes=10, depths=(1, 1, 17, 1))  # a chain of 16 blocks


def train_with(capacities: list[int]) -> list[float]:
    """Seconds of one step of each worker on its machine: its fastest step, divided by the speed."""
    strategy = resist.resist(workers, options.local_steps, capacities=capacities)
    job = resist.Job(network, strategy, example=next(train.batches(2)))
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05, momentum=0.9) for worker in job.workers]
    samplers = [Sampler(len(train), batch_size=32, seed=0, worker=index, workers=workers) for index in range(workers)]
    loaders = [train.loader(sampler) for sampler in samplers]
    seconds = [float("inf")] * workers
    for step in range(options.rounds * options.local_steps):
        for index, (worker, optimizer) in enumerate(zip(job.workers, optimizers)):
            images, labels = loaders[index].batch(step)
            begin = time.perf_counter()
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[index] = min(seconds[index], time.perf_counter() - begin)
        job.step(*optimizers)
    return [taken / speed for taken, speed in zip(seconds, options.speeds)]


def show(title: str, capacities: list[int], seconds: list[float]) -> None:
    print(f"\n{title}")
    for index, (held, taken) in enumerate(zip(capacities, seconds)):
        bar = "#" * round(40 * taken / max(seconds))
        speed = options.speeds[index]
        print(f"  worker {index}, speed {speed:<4}  {held:>2} blocks  {1000 * taken:6.1f} ms a step  {bar}")
    print(f"  a round takes as long as the slowest: {1000 * max(seconds) * options.local_steps:.0f} ms")


# 1. Equal capacities. 2. The time of a block and of the shared part, from two timings of worker 0.
num_blocks = resist.find_chains(network())[0].num_blocks
equal = [-(-num_blocks // workers)] * workers
seconds = train_with(equal)
show("Equal capacities", equal, seconds)
most = train_with([num_blocks] * workers)
block = max(0.0, (most[0] - seconds[0]) / (num_blocks - equal[0]))
rest = max(0.0, seconds[0] - equal[0] * block)

# 3. Assign the blocks one by one, each to the worker that then finishes first.
fitted = [1] * workers
while sum(fitted) < num_blocks:
    done = [(rest + (held + 1) * block) / speed for held, speed in zip(fitted, options.speeds)]
    fitted[min(range(workers), key=lambda worker: done[worker])] += 1
show("Capacities that fit the speeds", fitted, train_with(fitted))
