"""Four workers in one process: handwritten digits, a 32-layer network, on a laptop in about a minute.

    python examples/2_four_workers_in_one_process.py

The plans, batches and messages are the same as with four processes, but here a message is a copy in memory. For
separate processes, see example 3.
"""

import argparse

import torch
import torch.nn.functional as F

import resist
from resist.data import Sampler, load
from resist.models import build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each worker")
parser.add_argument("--local-steps", type=int, default=20, help="steps between two synchronizations")
options = parser.parse_args()

train, test = load("digits")  # 16x16 images, three equal channels

job = resist.Job(
    lambda: build("preact_small", num_classes=10),
    resist.resist(workers=4, local_steps=options.local_steps, min_depth=0),
    example=next(test.batches(2)),  # a batch, on which the network is checked
)
optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05, momentum=0.9) for worker in job.workers]
samplers = [Sampler(len(train), batch_size=32, seed=0, worker=worker.index, workers=4) for worker in job.workers]
loaders = [train.loader(sampler) for sampler in samplers]

(chain,) = job.chains
whole = sum(p.numel() for p in build("preact_small", num_classes=10).parameters())
for worker in job.workers:
    (held,) = job.plan.held(worker.index)  # of its only chain
    size = sum(p.numel() for p in worker.model.parameters())
    print(f"worker {worker.index} begins with blocks {held} of {chain.name}: {size / whole:.0%} of all weights")


def accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).sum() for images, labels in test.batches(100)]
    return float(sum(right)) / len(test)


def calibration():  # training images, to re-estimate the BatchNorm statistics of the full network
    return (loaders[0].batch(step)[0] for step in range(20))


for step in range(options.steps):
    losses = []
    for worker, optimizer, loader in zip(job.workers, optimizers, loaders):
        images, labels = loader.batch(step)
        loss = F.cross_entropy(worker.model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    synchronized = job.step(*optimizers)
    if synchronized and job.round % 4 == 0:
        held = job.plan.plans[0].blocks
        share = f"{accuracy(job.full_model(calibration())):6.1%}"
        print(f"round {job.round:>2}  loss {sum(losses) / 4:.3f}  full network {share} correct  next plan {held}")

sent = job.transport.take()["bytes"]
parts = [f"{traffic_kind} {num_bytes / 1e6:.1f} MB" for traffic_kind, num_bytes in sent.items() if num_bytes]
print(f"Sent in {job.round} rounds: {', '.join(parts)}")
