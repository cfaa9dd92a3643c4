"""ResIST under Ray Train: each worker of Ray trains as one worker of ResIST.

    python ray_train.py --workers 4 --storage /shared/runs

Every round is saved. When a worker is lost, Ray ends the others, starts all of them again, and they go on from there.
"""

import argparse
import os
import tempfile
from typing import Any

import ray
import ray.train
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ray.train.torch import TorchTrainer, get_device
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from torch import nn

import resist


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.relu(self.norm(x)))


def build_model() -> nn.Module:
    chain = [Block() for _ in range(8)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Sequential(*chain), nn.Flatten(), nn.Linear(16 * 64, 10))


def train(config: dict[str, Any]) -> dict[str, Any] | None:
    """What each worker runs, in a process of its own. Ray has initialized torch.distributed in it."""
    workers, device = ray.train.get_context().get_world_size(), get_device()
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images, labels = images.float().view(-1, 1, 8, 8) / 16, labels.long()
    strategy = resist.resist(workers, local_steps=config["local_steps"], min_depth=0)
    job = resist.Job(build_model, strategy, device=device, example=images[:8], timeout_s=60)
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.03, momentum=0.9)
    job.attach(optimizer)  # before a state is loaded

    checkpoint = ray.train.get_checkpoint()  # None in the first start
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            dcp.load({"job": job}, checkpoint_id=folder)
        print(f"worker {job.workers[0].index} goes on at step {job.step_index}")

    while job.step_index < config["steps"]:
        random = torch.Generator().manual_seed(workers * job.step_index + job.workers[0].index)
        chosen = torch.randint(len(images), (32,), generator=random)  # other images for each worker and step
        loss = F.cross_entropy(job.model(images[chosen].to(device)), labels[chosen].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if job.step(optimizer):  # the end of a round: each worker saves its part, and Ray puts the parts together
            with tempfile.TemporaryDirectory() as folder:
                dcp.save({"job": job}, checkpoint_id=folder)
                part = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"step": job.step_index, "loss": loss.item()}, checkpoint=part)

    full = job.full_model([images[:512].to(device)])  # in the process of worker 0; None in the others
    job.close()
    return None if full is None else {name: tensor.numpy(force=True) for name, tensor in full.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--storage", required=True, help="a folder that all machines see")
    parser.add_argument("--name", default="resist", help="of the folder in it; a run of this name is continued")
    options = parser.parse_args()
    if "RAY_ADDRESS" not in os.environ:  # no cluster: this machine, with as many workers as you want
        ray.init(num_cpus=options.workers, include_dashboard=False)
    trainer = TorchTrainer(
        train,
        train_loop_config={"steps": options.steps, "local_steps": options.local_steps},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=ray.train.RunConfig(
            name=options.name,
            storage_path=os.path.abspath(options.storage),
            failure_config=ray.train.FailureConfig(max_failures=1),  # how often all workers are started again
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    save_file(result.return_value, os.path.join(options.storage, options.name, "model.safetensors"))
    print(f"step {result.metrics['step']}, loss {result.metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
