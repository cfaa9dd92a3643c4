"""Your own network and loop: an MLP-Mixer on handwritten digits, with AdamW, clipping, an LR schedule and an EMA.

    python examples/4_your_own_network.py                           # one process hosts all workers
    torchrun --nproc-per-node 3 examples/4_your_own_network.py      # one process for each: the same weights

The only requirement is a run of equal blocks x + f(x) in one nn.Sequential or nn.ModuleList.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import resist


class Mix(nn.Module):
    def __init__(self, tokens: int = 16, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.within = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x):  # (batch, tokens, width)
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, depth: int = 9) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, kernel_size=2, stride=2)  # 8x8 images become 16 tokens
        self.blocks = nn.Sequential(*(Mix() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images):  # (batch, 1, 8, 8)
        return self.head(self.norm(self.blocks(self.stem(images).flatten(2).transpose(1, 2)).mean(1)))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each worker")
options = parser.parse_args()
digits = load_digits()
images, labels = torch.tensor(digits.images[:, None], dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
test, train = (torch.nonzero((torch.arange(len(labels)) % 5 == 0) == which)[:, 0] for which in (True, False))

job = resist.Job(Mixer, resist.resist(workers=3, local_steps=20), example=images[:4])  # or chains=("blocks:1-7",)
for worker in job.workers:
    print(f"worker {worker.index} holds {len(worker.model.blocks)} blocks of {job.chains[0].name}")


def groups(model):  # no weight decay for norms and biases
    rest = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": rest, "weight_decay": 0.0}]


optimizers = [torch.optim.AdamW(groups(worker.model), lr=3e-3, weight_decay=0.05) for worker in job.workers]
lr_schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps) for optimizer in optimizers]
averages = [AveragedModel(worker.model, multi_avg_fn=get_ema_multi_avg_fn(0.98)) for worker in job.workers]
job.follow(*averages)  # the average of a block moves with the block
for step in range(options.steps):
    for worker, optimizer, lr_schedule, average in zip(job.workers, optimizers, lr_schedules, averages):
        random = torch.Generator().manual_seed(1000 * step + worker.index)
        batch = train[torch.randint(len(train), (64,), generator=random)]
        F.cross_entropy(worker.model(images[batch]), labels[batch]).backward()
        nn.utils.clip_grad_norm_(worker.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        average.update_parameters(worker.model)
    job.step(*optimizers)
for name, averaged in (("the last weights", False), ("their moving average", True)):
    full = job.full_model(averaged=averaged)  # all blocks, scaled; None except in the process of worker 0
    if full is not None:
        right = (full(images[test]).argmax(1) == labels[test]).float().mean()
        print(f"{len(full.blocks)} blocks, {name}: {right:.1%} of {len(test)} test images correct")
job.close()
