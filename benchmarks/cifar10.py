"""Compare the accuracy of methods seed by seed, on CIFAR-10 or on 50 classes of Tiny ImageNet (setting `tiny`).

The network is a narrow ResNet101 that two cores can train.

    python benchmarks/cifar10.py --data-dir DIR --list                       # the rows and settings
    python benchmarks/cifar10.py --data-dir DIR --rows 'local SGD' 'ResIST, average' --seeds 0 1 2
    python benchmarks/cifar10.py --summary                                   # differences to local SGD, paired by seed

S = 4 and l = 25 unless a row names others, depths 3,4,23,3, width 8, final norm, batch 64 per worker, SGD with momentum
0.9 and weight decay 5e-4, a rate that falls along a cosine to exactly zero in the last step, crop and flip. Every
worker draws from the whole set. See `cifar10_rows.py` for rows and settings.

A run is one process with one thread that hosts all workers; `--jobs` of them run at once. One line of JSON for each is
appended to benchmarks/results/accuracy.jsonl, and runs that are there already are not repeated. The full network is
tested on the first 5,000 test images after each quarter, and at the end on all 10,000, with averaged and with
re-estimated statistics of BatchNorm. `train_cpu_s` is the processor time of training and synchronizing, without tests.
`gmac` is the work of all workers' forward passes in 1e9 multiplications: a measure of compute that does not depend on
how busy the machine is. `peak_bytes` is what `resist cost` predicts for the worker that needs most memory.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_image

from cifar10_rows import BASE, ROWS, SETTINGS, Row, Setting, Skipped
from paired import summary
from provenance import provenance
from resist.cost import predict
from resist.data import Images, Sampler, load
from resist.job import Job
from resist.planning.plan import keyed_int
from resist.subnet.batchnorm import recalibrate
from resist.tasks import Classification

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
QUARTERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--setting", choices=SETTINGS, default="screen")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[BASE, "ResIST, average"], metavar="ROW")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="factors of each row's learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--rounds", type=int, help="another number of rounds, to try the script; nothing is recorded")
    parser.add_argument("--list", action="store_true", help="print the rows and settings")
    parser.add_argument("--summary", action="store_true", help="print the table of the recorded runs")
    args = parser.parse_args()
    if args.list:
        print("\n".join(["settings: " + ", ".join(SETTINGS), "rows:", *(f"  {name}" for name in ROWS)]))
        return
    if not args.summary:
        setting, recorded = SETTINGS[args.setting], read(RESULTS)
        if args.rounds:
            setting = replace(setting, name=f"{setting.name}, {args.rounds} rounds", rounds=args.rounds)
        known = {(run["setting"], run["row"], run["seed"]) for run in recorded}
        wanted = [
            (setting, row, seed, args.data_dir)
            for seed in args.seeds  # all rows of a seed first: a stopped comparison is then a complete smaller one
            for row in (ROWS[name].at_rate(factor) for name in args.rows for factor in args.rates)
            if (setting.name, row.name, seed) not in known
        ]
        for run in runs(wanted, args.jobs):
            print(json.dumps(run), flush=True)
            if not args.rounds:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    print(summary([run for run in read(RESULTS) if run["setting"] == args.setting], BASE))


def read(file: Path) -> list[dict[str, Any]]:
    """Return the recorded runs."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def runs(wanted: Iterable[tuple[Setting, Row, int, str]], jobs: int) -> Iterable[dict[str, Any]]:
    """Train `jobs` runs at once, and yield each result when it is there."""
    context = multiprocessing.get_context("fork")  # rows hold functions, which are not pickled
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(in_process, context, task) for task in wanted]):
            yield done.result()


def in_process(context: multiprocessing.context.ForkContext, task: tuple[Setting, Row, int, str]) -> dict[str, Any]:
    """Train one run in a process of its own, and return its result."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(one(*task)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise SystemExit(f"{task[1].name}, seed {task[2]}: ended without a result; see above") from error
    finally:
        process.join()


def one(setting: Setting, row: Row, seed: int, data_dir: str) -> dict[str, Any]:
    """Train one run, and return its line of the results."""
    torch.set_num_threads(1)
    train, test = (smaller(part, setting.image_size) for part in images_of(setting, data_dir))
    measured = trained(setting, row, seed, train, test) | {"peak_bytes": peak_bytes(setting, row, train.num_classes)}
    about = {"benchmark": "accuracy", "setting": setting.name, "row": row.name, "seed": seed}
    about |= {"settings": asdict(setting), "wire": asdict(row.wire), "plain": row.plain}
    return {**about, **measured, **provenance("accuracy")}


def images_of(setting: Setting, data_dir: str) -> tuple[Images, Images]:
    """Read the training and test images of a setting."""
    if setting.data == "cifar10":
        train, test = load("cifar10", data_dir, download=False)
        assert isinstance(train, Images)
        assert isinstance(test, Images)
        return train, test
    train, test = (in_folders(Path(data_dir) / setting.data / part) for part in ("train", "val"))
    # Both are normalized with the statistics of the training images, as everywhere.
    return train, replace(test, mean=train.mean, std=train.std)


def in_folders(folder: Path) -> Images:
    """Read images of one size from folders, one for each class, into memory."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    images = torch.stack([decode_image(str(file), ImageReadMode.RGB) for file, _ in files])
    std, mean = torch.std_mean(images.transpose(0, 1).flatten(1).float() / 255, dim=1)
    labels = torch.tensor([label for _, label in files])
    return Images(
        images, labels, len(classes), tuple(mean.tolist()), tuple(std.tolist()), pad=images.shape[-1] // 8, flip=True
    )


def smaller(data: Images, size: int) -> Images:
    """Average the images to `size` pixels; shifts in training keep their share of the image."""
    if size == data.images.shape[-1]:
        return data
    images = F.adaptive_avg_pool2d(data.images.float(), size).round().to(torch.uint8)
    return replace(data, images=images, pad=data.pad * size // data.images.shape[-1])


def trained(setting: Setting, row: Row, seed: int, train: Images, test: Images) -> dict[str, Any]:
    """Train, and return accuracies and costs."""
    rounds = max(1, round(setting.rounds * row.share))
    strategy = row.strategy(row, rounds)
    job = Job(
        lambda: row.network(train.num_classes), strategy, seed=seed, batchnorm="average", wire=row.wire, example=False
    )
    optimizers = [optimizer_of(worker.subnet.parameter_places(), row) for worker in job.workers]
    averages = [
        AveragedModel(worker.subnet.model, multi_avg_fn=get_ema_multi_avg_fn(row.ema))
        for worker in job.workers
        if row.ema is not None
    ]
    if averages:
        job.follow(*averages)
    loaders = [
        train.loader(
            Sampler(len(train), batch_size=setting.batch_size, seed=seed, worker=w.index, workers=len(job.workers))
        )
        for w in job.workers
    ]
    steps = rounds * row.local_steps
    marks = {steps * quarter // QUARTERS: quarter for quarter in range(1, QUARTERS)}
    curve: list[float] = []
    train_s, gmac, work, start = 0.0, 0.0, [0.0], time.process_time()
    teacher: nn.Module | None = None
    for step in range(steps):
        if step % row.local_steps == 0:  # the plan of a round
            work = [gmacs(worker.subnet.model, setting.image_size) for worker in job.workers]
            if row.teacher_every and step:
                teacher = job.full_model()
                assert teacher is not None
                work.append(gmacs(teacher, setting.image_size) * len(job.workers) / row.teacher_every / 3)
        gmac += sum(work) * setting.batch_size
        # The last step is taken at a rate of exactly zero.
        lr = setting.lr * row.lr * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
        for worker, optimizer, loader in zip(job.workers, optimizers, loaders, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            torch.manual_seed(keyed_int("step", seed, worker.index, step))  # for stochastic depth
            images, labels = loader.batch(step)
            scores = worker.model(images)
            loss = F.cross_entropy(scores, labels)
            if teacher is not None and step % row.teacher_every == 0:
                with torch.no_grad():
                    taught = teacher(images).softmax(1)
                loss = (loss + F.cross_entropy(scores, taught)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for worker, average in zip(job.workers, averages, strict=False):
            average.update_parameters(worker.subnet.model)
        job.step(*optimizers)
        if step + 1 in marks:
            train_s += time.process_time() - start
            full = job.full_model()
            assert full is not None
            curve.append(accuracy(full, test, 5000))
            start = time.process_time()
    train_s += time.process_time() - start
    traffic = job.transport.take()
    return {
        "rounds": rounds,
        "percent_at_quarters": curve,
        "percent": readings(job, train, test, ema=row.ema is not None, scales=row.scales),
        "train_cpu_s": round(train_s, 1),
        "gmac": round(gmac),
        "bytes": traffic["bytes"],
        "weights_held": max(worker.subnet.numel(job.plan.capacities(worker.index)) for worker in job.workers),
    }


def peak_bytes(setting: Setting, row: Row, num_classes: int = 10) -> int:
    """Predict the memory that the worker with most of it needs in training."""
    shape = (3, setting.image_size, setting.image_size)
    peaks: list[int] = []
    for stage in row.strategy(row, max(1, round(setting.rounds * row.share))).stages:
        report = predict(
            lambda: row.network(num_classes), [replace(stage, then=None, at_round=0)],
            batch_size=setting.batch_size, image_shape=shape, wire=row.wire,
            average=row.ema is not None, example=False, rounds=1,
        )  # fmt: skip
        peaks += [network.memory.peak for at in report.rows for network in at.networks]
    return max(peaks)


def optimizer_of(places: Iterable[tuple[nn.Parameter, Any]], row: Row) -> torch.optim.SGD:
    """Make SGD with a group for the shared part and one for the chain."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter, place in places:
        parts[place.chain is not None].append(parameter)
    groups = [
        {"params": part, "factor": factor} for part, factor in zip(parts, (1.0, row.chain_lr), strict=True) if part
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4)


def gmacs(model: nn.Module, image_size: int) -> float:
    """Return the 1e9 multiplications of a forward pass of one image; with stochastic depth, those that are expected."""
    skipped = [module for module in model.modules() if isinstance(module, Skipped)]
    counts = []
    for forced in (0.0, 1.0) if skipped else (1.0,):
        for module in skipped:
            module.forced = forced
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, torch.random.fork_rng(devices=[]):
            statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model(torch.zeros(2, 3, image_size, image_size))
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
        counts.append(counter.get_total_flops() / 2 / 2 / 1e9)
    for module in skipped:
        module.forced = None
    return counts[0] + (counts[-1] - counts[0]) * skipped[0].survival if skipped else counts[0]


@torch.no_grad()
def accuracy(model: nn.Module, test: Images, num: int) -> float:
    """Return the percentage of correct answers on the first `num` test images, or on all if they are fewer."""
    model.eval()
    num = min(num, len(test))
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.batches(100, limit=-(-num // 100)))
    return 100 * right / num


def readings(job: Job, train: Images, test: Images, *, ema: bool, scales: Sequence[float] = ()) -> dict[str, float]:
    """Return the accuracy of the final weights on all test images, with each source of BatchNorm statistics.

    With other scales of the chain's branches, too, and that of the first worker's sub-network: both re-estimated.
    """

    def estimated(model: nn.Module) -> float:
        # The images on which `resist train` estimates statistics: augmented training images.
        recalibrate(model, Classification(nn.Identity, train, train).calibration(0), torch.device("cpu"))
        return accuracy(model, test, len(test))

    result: dict[str, float] = {}
    for averaged in (False, True) if ema else (False,):
        full = job.full_model(averaged=averaged)
        assert full is not None
        name = "EMA, " if averaged else ""
        if not averaged:  # the statistics of an average over time are those of the last step
            result["averaged"] = accuracy(full, test, len(test))
        result[f"{name}re-estimated"] = estimated(full)
    if scales:
        result["sub-network"] = estimated(deepcopy(job.workers[0].subnet.model))
    inclusion = job.scales[0]
    for factor in scales:
        job.scale = factor * inclusion
        full = job.full_model()
        assert full is not None
        result[f"scale x {factor:g}"] = estimated(full)
    return result


if __name__ == "__main__":
    main()
