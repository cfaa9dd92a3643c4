"""Train the paper's network on CIFAR-10 with torchrun, one process for each worker, in a plain loop.

    torchrun --nproc-per-node 4 examples/3_torchrun_cifar10.py --data data --epochs 40
    torchrun --nproc-per-node 2 examples/3_torchrun_cifar10.py --synthetic --network preact_small --max-steps 8

On several hosts: torchrun --nnodes 4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/3_...
"""

import argparse
import os
from itertools import islice

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import resist
from resist.models import build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", default="data", help="folder that contains cifar-10-batches-py")
parser.add_argument("--synthetic", action="store_true", help="noise instead of CIFAR-10")
parser.add_argument("--network", default="preact_resnet101")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--local-steps", type=int, default=50)
parser.add_argument("--max-steps", type=int, default=10**9)
options = parser.parse_args()

workers = int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

normalize = v2.Normalize([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
if options.synthetic:
    labels = torch.arange(512) % 10
    train = test = TensorDataset(torch.randn(512, 3, 32, 32) + labels.view(-1, 1, 1, 1) / 5, labels)
else:
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *tensor])
    train = datasets.CIFAR10(options.data, transform=augment)
    test = datasets.CIFAR10(options.data, train=False, transform=v2.Compose(tensor))

strategy = resist.resist(workers, local_steps=options.local_steps)
example = torch.stack([train[0][0], train[1][0]])
job = resist.Job(lambda: build(options.network, num_classes=10), strategy, device=device, example=example)
worker = job.workers[0]
optimizer = torch.optim.SGD(job.model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)

# Each worker reads the whole set in its own order. An epoch is one pass of all workers together.
order = torch.Generator().manual_seed(worker.index)
loader = DataLoader(train, batch_size=64, shuffle=True, generator=order, drop_last=True)
steps = min(options.epochs * len(loader) // workers, options.max_steps)
lr_schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
while job.step_index < steps:
    for images, labels in islice(loader, steps - job.step_index):
        loss = F.cross_entropy(job.model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        if job.step(optimizer) and worker.index == 0:
            print(f"round {job.round}, step {job.step_index} of {steps}: loss {loss.item():.3f}", flush=True)

full = job.full_model(islice(loader, 40))  # None except in the process of worker 0
if full is not None:
    with torch.no_grad():
        right = [(full(x.to(device)).argmax(1).cpu() == y).float().mean() for x, y in DataLoader(test, batch_size=128)]
    sent = sum(job.transport.take()["wire_bytes"].values())
    print(f"{workers} workers: the full network is {sum(right) / len(right):.1%} correct; {sent / 1e6:.0f} MB sent")
job.close()
