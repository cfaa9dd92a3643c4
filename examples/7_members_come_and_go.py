"""Members that come and go: one of four processes is killed, the others go on, and one that has waited joins them.

    python examples/7_members_come_and_go.py

This process serves the store at which the members agree. For several machines, `resist rendezvous` serves it.
"""

import os
import subprocess
import sys
from functools import partial

import torch

import resist
from resist.data import Sampler, load
from resist.members.generations import connect_members, regroup
from resist.members.membership import Membership
from resist.members.secret import read_secret
from resist.members.store_client import SecretStore
from resist.members.store_server import StoreServer
from resist.models import build

MOST, STEPS, SIZE = 4, 300, {"workers": lambda generation: len(generation.members)}  # a worker in each process
job_over = partial(
    resist.Job, lambda: build("preact_small", num_classes=10, depths=(1, 1, 9, 1), width=8),
    resist.resist(MOST, 20, min_depth=0), batchnorm="average", example=torch.zeros(2, 3, 8, 8),
    elastic=True, replicate=True,
)  # fmt: skip


def member(membership: Membership) -> None:
    job = job_over(transport=resist.Unconnected(MOST)) if membership.founded() else None  # the others need not wait
    changed = membership.join(expected=MOST).number > 0  # in other members than those that the job knows
    _, transport = connect_members(membership, dict, **SIZE)
    print(f"process {os.getpid()} is a member\n", end="", flush=True)
    job = job or job_over(transport=resist.Unconnected(MOST) if changed else transport)
    train, test = load("digits")
    job.attach(optimizer := torch.optim.SGD(job.model.parameters(), lr=0.02, momentum=0.9))
    while job.step_index < STEPS:
        try:
            if changed:
                found, changed = job.regroup(transport), False
                print(f"step {found.step}: {found.workers} members\n" * (0 in transport.hosted), end="", flush=True)
            sampler = Sampler(len(train), batch_size=32, seed=0, worker=job.workers[0].index, workers=MOST)
            images, labels = train.loader(sampler).batch(job.step_index)
            torch.nn.functional.cross_entropy(job.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.step(optimizer):  # at a round's end, what worker 0 sees decides for all
                changed = job.transport.all_gather_text(str(bool(membership.newcomers())))[0] == "True"
                print(f"round {job.round} is done\n" * (0 in job.transport.hosted), end="", flush=True)
        except resist.WorkerLostError:
            changed = True
        if changed:
            _, transport = regroup(membership, transport, {}, **SIZE)
    if (full := job.full_model()) is not None:
        right = sum(int((full(x).argmax(1) == y).sum()) for x, y in test.batches(60))
        print(f"{job.strategy.workers} members: {right} of {len(test)} test images correct", flush=True)
    membership.end("all steps are done", together=True)
    job.close()


if len(sys.argv) == 2:  # a member, which is given the port of the store
    own = Membership(SecretStore("127.0.0.1", int(sys.argv[1]), read_secret()), {"data": "digits"}, least=2, most=MOST)
    try:
        member(own)
    finally:
        own.leave()  # what ends by an exception, too: the others need not wait for it
else:
    os.environ |= {"RESIST_SECRET": os.urandom(32).hex(), "OMP_NUM_THREADS": "1"}  # the members inherit them
    server, (reader, writer) = StoreServer("127.0.0.1", 0, read_secret()), os.pipe()
    command = [sys.executable, __file__, str(server.port)]
    processes, joined = [subprocess.Popen(command, stdout=writer) for _ in range(MOST + 1)], []
    os.close(writer)  # the lines end with the last process
    for line in open(reader):  # noqa: SIM115
        print(line, end="")
        joined += [line.split()[1]] * line.endswith("is a member\n")
        if line == "round 3 is done\n":
            os.kill(int(joined[0]), 9)  # SIGKILL
