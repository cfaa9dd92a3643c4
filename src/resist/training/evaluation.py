"""Tests of the full network during a run: after which rounds, by which processes, and what they find.

Where the options do not say it, both are decided at the end of the first round, from what every process knows then: the
time of the round's steps, free memory, the speed of the links. All processes gather these facts, and each computes the
decision from them, so that they agree without another message. Who tests is decided once; each test corrects how many
there will be.
"""

import socket
import time
from dataclasses import asdict
from typing import Any

import torch

from resist.cost.evaluation import Choice, Process, choose_testers, forward_pass, num_tests
from resist.cost.footprint import build_on_meta
from resist.data.readers import num_cores
from resist.errors import UserError
from resist.job import Job
from resist.runs.config import TrainConfig
from resist.runs.directory import Run
from resist.runs.model_file import EMA_FILE, FILE, save_full
from resist.subnet.batchnorm import has_running_statistics, recalibrate
from resist.subnet.seeded import fingerprint
from resist.sync.assembly import fetched_bytes
from resist.tasks import Task, image_shape
from resist.training.device import autocast, free_bytes, naming_nondeterminism
from resist.training.lr_schedule import evaluation_rounds

MOST = 10  # tests of a run, unless the options say more
PROBE_BYTES = 1 << 20  # sent by each process to each other one, to measure the links between machines


class Evaluation:
    """Tests of the full network in a run.

    Args:
        config: The options.
        task: Data and metric.
        job: The job, before its first step here.
        rounds: Number of rounds that the run will have.
        run: The run directory; None in all but the main process.

    Attributes:
        choice: Who tests; None until the first round has ended.
        rounds: The rounds after which the network is tested, counted from 1. The last round of the run always counts.
        seconds: Seconds of each test, in this process.
        failed: An error of a test, which ends the run when all processes know of it.
    """

    def __init__(self, config: TrainConfig, task: Task, job: Job, rounds: int, run: Run | None) -> None:
        self._config, self._task, self._job, self._run = config, task, job, run
        self._networks = 1 if config.optimization.model_ema_decay is None else 2
        self._num = config.run.num_evals
        if self._num is None and "accuracy" in config.budgets():
            self._num = MOST  # the end of the run depends on them
        self._total, self._first_round = rounds, job.round
        self._known = -1  # tests whose seconds the number of tests follows from
        self._news = False
        self.rounds = {rounds} if self._num is None else evaluation_rounds(rounds, self._num)
        self.choice: Choice | None = None
        self.seconds: list[float] = []
        self.failed: str | None = None
        self._link_bytes_s = _probe(job)

    def facts(self, image_s: float, training_s: float) -> dict[str, Any]:
        """Return what this process contributes to the decisions.

        Args:
            image_s: Seconds of computation for an image in the round that ends, in this process.
            training_s: Seconds of training since the run began here.
        """
        facts: dict[str, Any] = {"training_s": training_s, "tests": [len(self.seconds), sum(self.seconds)]}
        if self.choice is None:
            facts |= {"process": asdict(self._process()), **self._costs(image_s)}
        return facts if self.choice is None or self._num is None else {}

    def decide(self, processes: list[dict[str, Any]], round: int) -> None:
        """Decide who tests, and after which rounds: the same in all processes.

        Args:
            processes: The facts of each process.
            round: Number of the round that ends, from 1.
        """
        main = processes[0]
        if self.choice is None:
            self.choice = choose_testers(
                [Process(**facts["process"]) for facts in processes],
                busy_s=main["busy_s"],
                memory_bytes=main["memory_bytes"],
                wanted=self._config.run.evaluation,
            )
            self._news = True
        if self._num is not None or main["tests"][0] == self._known:
            return
        self._known, total_s = main["tests"]
        test_s = total_s / self._known if self._known else self.choice.seconds
        run_s = main["training_s"] / (round - self._first_round) * self._total
        num = num_tests(run_s, test_s, MOST)
        rounds = {number for number in evaluation_rounds(self._total, num) if number >= round}
        self._news = self._news or rounds != {number for number in self.rounds if number >= round}
        self.rounds = rounds

    def entry(self) -> dict[str, Any]:
        """Return the entry of a round's record: what was decided in it, if something was."""
        news, self._news = self._news and self.choice is not None, False
        if not news or self.choice is None:
            return {}
        choice = {"by": "all" if self.choice.everywhere else "one", "reason": self.choice.reason}
        return {"evaluation": {**choice, "predicted_s": self.choice.seconds, "rounds": sorted(self.rounds)}}

    def _process(self) -> Process:
        job = self._job
        subnet, own = job.workers[0].subnet, job.workers[0].index
        at_once = 1 if subnet.device.type == "cuda" else max(1, num_cores() // torch.get_num_threads())
        return Process(
            place=f"{socket.gethostname()} {subnet.device}",
            at_once=at_once,
            free_bytes=free_bytes(subnet.device),
            fetch_bytes=self._networks * fetched_bytes(job.transport, subnet, job.plan, own),
            link_bytes_s=self._link_bytes_s,
        )

    def _costs(self, image_s: float) -> dict[str, Any]:
        """Predicted seconds of a test by this process, and the memory that it needs; only those of the main one count.

        A training step computes three times what a forward pass does.
        """
        wanted, job, subnet = self._config.run.evaluation, self._job, self._job.workers[0].subnet
        if self._run is None or (self._num is not None and (job.transport.num_processes == 1 or wanted != "auto")):
            return {"busy_s": 0.0, "memory_bytes": 0}  # nothing depends on them
        everything = [chain.num_blocks for chain in job.chains]
        calibration, tested, batch = self._task.test_images
        images = tested + (calibration if job.batchnorm == "recalibrate" else 0)
        weights_bytes = subnet.num_bytes(everything)
        template, shape = build_on_meta(self._task.network), image_shape(self._config.network)
        full = forward_pass(template, job.chains, everything, batch, shape)
        own = forward_pass(template, job.chains, subnet.capacities, batch, shape)
        if full is not None and own is not None and own.flops:
            deeper, activation_bytes = full.flops / own.flops, full.peak_bytes
        else:
            deeper, activation_bytes = subnet.numel(everything) / subnet.numel(subnet.capacities), 2 * weights_bytes
        return {
            "busy_s": self._networks * images * image_s / 3 * deeper,
            "memory_bytes": 2 * weights_bytes + activation_bytes,  # a network is assembled, and then copied
        }

    def test(self, *, last: bool) -> dict[str, float]:
        """Test the full network; returns its scores in the main process ({} elsewhere). Saves the last network.

        All processes call this. The network of averaged weights, if there is one, comes second. Where an image cannot
        be read, all processes end with that error at the end of the next round.
        """
        start = time.perf_counter()
        scores: dict[str, float] = {}
        device, precision = self._job.workers[0].subnet.device, self._config.machine.precision
        for averaged in (False, True)[: self._networks]:
            try:
                with (
                    naming_nondeterminism(),
                    autocast(device, precision),
                ):  # one for each network, since it keeps converted weights
                    found = self._test(averaged=averaged, last=last)
            except UserError as error:
                self.failed = str(error)
                break
            scores |= {f"EMA {name}" if averaged else name: round(value, 6) for name, value in found.items()}
        self.seconds.append(time.perf_counter() - start)
        return scores if self._run is not None else {}

    def _test(self, *, averaged: bool, last: bool) -> dict[str, float]:
        """Assemble a network, save it if it is the last one, and test it."""
        job, task = self._job, self._task
        everywhere = self.choice is not None and self.choice.everywhere
        full = job.full_model(task.calibration(job.seed), on=None if everywhere else 0, averaged=averaged)
        if everywhere and full is not None:
            digests = job.transport.all_gather_text(fingerprint(full)["weights"])
            if len(set(digests)) > 1:  # buffers that no synchronization exchanges, or another kind of processor
                self.choice = Choice(False, "the processes assemble different networks", 0.0)
                self._news, everywhere = True, False
                full = job.full_model(task.calibration(job.seed), averaged=averaged)
        if full is None:
            return {}
        together = job.together if everywhere else None
        if averaged and job.batchnorm == "average" and has_running_statistics(full):
            # The statistics belong to the weights of the last step, not to their average.
            device = job.workers[0].subnet.device
            recalibrate(full, task.calibration(job.seed), device, seed=job.seed, processes=together)
        if last and self._run is not None:
            save_full(full, job.chains, job.scales, self._run.path / (EMA_FILE if averaged else FILE))
        return task.test(full, together)


def _probe(job: Job) -> float | None:
    """Bytes per second that this process gets from the others; None where all are on one machine.

    Waits for all processes.
    """
    if job.transport.num_processes == 1 or len(set(job.transport.all_gather_text(socket.gethostname()))) == 1:
        return None
    together, seconds = job.together, 0.0
    for _ in range(2):  # the first time opens the connections
        start = time.perf_counter()
        together.gather(lambda: torch.zeros(PROBE_BYTES, dtype=torch.uint8, device="cpu"))
        seconds = time.perf_counter() - start
    return PROBE_BYTES * (together.count - 1) / max(1e-9, seconds)
