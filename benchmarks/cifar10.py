"""Measure the accuracy on CIFAR-10 of a narrow ResNet101 that two cores can train, one run per call.

    python benchmarks/cifar10.py --data-dir DIR --strategy resist --optimizer-state travel

Setting (as in the first prototypes, so that figures can be compared): S = 4, depths 3,4,23,3, width 8, final
norm, batch 64 per worker, 25 local steps, 120 rounds, SGD with lr 0.05 (divided by 10 after 50 % and 75 %), momentum
0.9, weight decay 5e-4, crop and flip, every worker draws from the whole set, one thread, one process for all workers.

During training, the full network is tested on the first 5,000 test images every 20 rounds. At the end it is tested on
these and on all 10,000, with each source of BatchNorm statistics, with and without the scale. `train_cpu_s` is the
processor time of training and synchronizing, without the evaluations; processor time, because the machine is shared.
One line of JSON with the provenance is appended to benchmarks/results/cifar10.jsonl.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resist
from provenance import provenance
from resist.data import Images, Sampler, load
from resist.job import Job
from resist.models import build
from resist.subnet.batchnorm import recalibrate, use_batch_statistics
from resist.tasks import Classification

RESULTS = Path(__file__).parent / "results" / "cifar10.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--strategy", choices=("resist", "local_sgd"), default="resist")
    parser.add_argument("--optimizer-state", default="travel")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--local-steps", type=int, default=25)
    parser.add_argument("--min-depth", type=int, default=None)
    parser.add_argument(
        "--chain-lr", type=float, default=1.0, help="factor for the learning rate of the chain's blocks"
    )
    parser.add_argument("--local-sgd-first", type=int, default=0, help="rounds of local SGD before ResIST")
    parser.add_argument("--local-sgd-last", type=int, default=0, help="rounds of local SGD after ResIST")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = load("cifar10", args.data_dir, download=False)
    record = {"benchmark": "cifar10", **vars(args), **run(args, train, test), **provenance()}
    record.pop("data_dir")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


def run(args: argparse.Namespace, train: Images, test: Images) -> dict[str, object]:
    job = Job(
        lambda: build("preact_resnet101", num_classes=10, width=8, final_norm=True),
        strategy_of(args),
        seed=args.seed,
        batchnorm="average",  # the other sources of statistics are applied to copies, at the end
    )
    optimizers = [optimizer_of(job, worker.index, args.chain_lr) for worker in job.workers]
    loaders = [
        train.loader(Sampler(len(train), batch_size=64, seed=args.seed, worker=worker.index, workers=args.workers))
        for worker in job.workers
    ]
    steps, train_s, curve = args.rounds * args.local_steps, 0.0, {}
    start = time.process_time()
    for step in range(steps):
        for worker, optimizer, loader in zip(job.workers, optimizers, loaders, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * group["factor"] * (1 if step < steps / 2 else 0.1 if step < 0.75 * steps else 0.01)
            images, labels = loader.batch(step)
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if job.step(*optimizers) and job.round % 20 == 0:
            train_s += time.process_time() - start
            full = job.full_model()
            assert full is not None
            recalibrate(full, augmented_batches(train), torch.device("cpu"))
            curve[job.round] = accuracy(full, test, 5000)
            print(f"round {job.round}: {curve[job.round]:.2f} % after {train_s:.0f} s", flush=True)
            start = time.process_time()
    return {"percent_of_5000": curve, "train_cpu_s": round(train_s, 1), "readings": readings(job, train, test)}


def strategy_of(args: argparse.Namespace) -> resist.Strategy:
    state = args.optimizer_state
    if args.strategy == "local_sgd":
        return resist.local_sgd(args.workers, args.local_steps, optimizer_state=state)
    strategy = resist.resist(args.workers, args.local_steps, min_depth=args.min_depth, optimizer_state=state)
    local_sgd = resist.local_sgd(args.workers, args.local_steps, optimizer_state=state)
    if args.local_sgd_first:
        strategy = resist.switch(local_sgd, strategy, at_round=args.local_sgd_first)
    if args.local_sgd_last:
        strategy = resist.switch(strategy, local_sgd, at_round=args.rounds - args.local_sgd_last)
    return strategy


def optimizer_of(job: Job, index: int, chain_lr: float) -> torch.optim.SGD:
    worker = next(worker for worker in job.workers if worker.index == index)
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter, place in worker.subnet.parameter_places():
        parts[place.chain is not None].append(parameter)
    groups = [{"params": parts[0], "factor": 1.0}, {"params": parts[1], "factor": chain_lr}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-4)


def augmented_batches(train: Images) -> Iterator[Tensor]:
    """Yield the training images on which `resist train` estimates statistics."""
    return Classification(nn.Identity, train, train).calibration(0)


def plain_batches(train: Images) -> list[Tensor]:
    """Return the first 5,000 training images without augmentation, as the first runs used them."""
    return [images for images, _ in train.batches(250, limit=20)]


@torch.no_grad()
def accuracy(model: nn.Module, test: Images, num: int) -> float:
    """Return the percentage of correct answers on the first `num` test images, in batches of 100."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.batches(100, limit=num // 100))
    return 100 * right / num


def readings(job: Job, train: Images, test: Images) -> dict[str, dict[str, float]]:
    """Return the accuracy of the final weights for each scale and each source of BatchNorm statistics."""
    result: dict[str, dict[str, float]] = {}
    for scale in ("inclusion", 1.0):
        job.scale = scale
        averaged = job.full_model()
        assert averaged is not None
        batch, augmented, plain = (copy.deepcopy(averaged) for _ in range(3))
        use_batch_statistics(batch)
        recalibrate(augmented, augmented_batches(train), torch.device("cpu"))
        recalibrate(plain, plain_batches(train), torch.device("cpu"))
        named = {"average": averaged, "batch": batch, "recalibrate": augmented, "recalibrate, not augmented": plain}
        for name, model in named.items():
            result[f"{name}, scale {scale}"] = {f"of_{num}": accuracy(model, test, num) for num in (5000, 10000)}
    return result


if __name__ == "__main__":
    main()
