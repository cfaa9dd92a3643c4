"""Job: ResIST in the user's own training loop; `Job.step` is the only call in it.

    job = Job(build_model, resist(workers=4, local_steps=50))   # draw sub-networks             (Algorithm 1, line 1)
    ... optimizer.step(); job.step(optimizer)                   # l local steps on each         (lines 2 to 4)
                                                                # average, draw the next plan   (lines 5 and 6)
    full = job.full_model(batches)                              # the complete network, scaled

`docs/algorithm.md` maps each line of the algorithm to the code.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resist.errors import DivergedError, UserError
from resist.planning.plan import Plan
from resist.planning.strategy import Strategy
from resist.subnet.batchnorm import BATCHNORMS, has_running_statistics, recalibrate, use_batch_statistics
from resist.subnet.chains import choose_chains
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.scaling import scale_branches
from resist.subnet.seeded import build_seeded
from resist.sync.agreement import agree_on_round, check_agreement, job_values
from resist.sync.assembly import assemble
from resist.sync.averaging import VELOCITY, all_finite
from resist.sync.distributed import connect
from resist.sync.exchange import Exchange
from resist.sync.optimizer_state import OPTIMIZER_STATES, optimizers_of
from resist.sync.payload import collect_payloads
from resist.sync.replicas import Replica, collect_replica, keep_newest
from resist.sync.traffic import CountingTransport
from resist.sync.transport import Transport
from resist.sync.worker import Worker

NONFINITE = ("stop", "drop")


class Job:
    """Train the network of `build_model` by a strategy.

    A job hosts one or more of the strategy's workers. The same code runs in one process, which then hosts all workers,
    and in several processes under torchrun:

    ```python
    import torch
    import torch.nn.functional as F
    from resist import Job, resist
    from resist.models import PreActResNet

    job = Job(lambda: PreActResNet((1, 1, 7, 1), 10, width=8), resist(workers=2, local_steps=5))
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.03, momentum=0.9) for worker in job.workers]
    for _ in range(10):
        for worker, optimizer in zip(job.workers, optimizers):
            images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))  # a batch of this worker's own
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        job.step(*optimizers)  # the 5th and the 10th call synchronize
    full = job.full_model([images])  # in the process of worker 0; None in the others
    job.close()
    ```

    Args:
        build_model: Returns the full network. Called once, on the CPU, with torch's CPU generator seeded by `seed` and
            restored afterwards. Every process builds the same network and keeps only the part of its workers.
        strategy: Number of workers, plans and local steps; see `resist.resist`, `resist.local_sgd`, `resist.diloco`,
            `resist.ddp` and `resist.switch`.
        chains: Names of the chains to partition, such as "layer3:1-22" or "layer3". Default: the longest run of
            interchangeable residual blocks.
        seed: Seed of the initial weights and of the plans.
        batchnorm: BatchNorm statistics of the full network. "recalibrate": running statistics are averaged over
            holders, and `full_model(batches)` estimates them again on the scaled network. "average": only averaged.
            "batch": no running statistics, as in the authors' code; the network uses the statistics of each batch, at
            test time too.
        scale: Factor of each chain block's branch in the full network. "inclusion": the probability that a worker holds
            the block, mean capacity / num_blocks. "1/S": one over the number of workers. Or a number.
        device: Device of the sub-networks.
        channels_last: Store 4-D weights in the memory format channels last.
        transport: Connects the workers. Default: torch.distributed if this process was started for it (by torchrun, or
            with an initialized process group); otherwise this process hosts all workers.
        timeout_s: Seconds after which waiting for another process is an error. Must exceed the time by which the
            slowest worker's round is longer than the fastest one's.
        on_nonfinite: Reaction to NaN or inf in the weights of a worker at the end of a round. "stop": DivergedError in
            all processes. "drop": the worker is left out of the means of this round, blocks that only it held keep
            the weights from before the round, and `dropped` has the reason. Needs memory for one more copy of the
            worker's weights.
        replicate: Keep a replica of each block that only one worker holds, until the next synchronization is complete,
            so that losing any one worker costs at most the current round; see `replicas`. Needs memory for one more
            copy of the worker's weights, and for the replicas that it keeps.
        resume_at: (round, step) to continue an interrupted job at; see `resist.runs.checkpoint`.

    Attributes:
        workers: The hosted workers, ascending.
        strategy: The strategy.
        chains: The chains that are partitioned.
        plans: Chain name -> plan of the present round.
        round: The round that the next step belongs to, counted from 0.
        step_index: Steps done.
        transport: The transport, which counts bytes and messages; see `take` there.
        dropped: Workers that were left out of the last synchronization, each with the reason.
        replicas: Weights of the last synchronized network that this process keeps, if `replicate`; the newest is last.

    Raises:
        UserError: If an option is invalid, if the network has no chain that can be partitioned, or if the process group
            cannot be formed within `timeout_s`.
        AgreedError: In all processes, if they were started with different arguments or networks.
        WorkerLostError: If another process is lost after that.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        strategy: Strategy,
        *,
        chains: str | Sequence[str] = (),
        seed: int = 0,
        batchnorm: str = "recalibrate",
        scale: str | float = "inclusion",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        transport: Transport | None = None,
        timeout_s: float = 600.0,
        on_nonfinite: str = "stop",
        replicate: bool = False,
        resume_at: tuple[int, int] = (0, 0),
    ) -> None:
        _check_options(strategy, batchnorm, on_nonfinite, replicate)
        self.strategy, self.seed, self.batchnorm, self.scale = strategy, seed, batchnorm, scale
        self.on_nonfinite, self.replicate = on_nonfinite, replicate
        self.replicas: list[Replica] = []
        self.dropped: dict[int, str] = {}
        self.round, self.step_index = resume_at
        self._steps_in_round = 0
        self._optimizers: tuple[Optimizer, ...] = ()
        full = build_seeded(build_model, seed)
        if batchnorm == "batch":
            use_batch_statistics(full)
        self.chains = choose_chains(full, (chains,) if isinstance(chains, str) else tuple(chains))
        self.plans = self.plans_of(self.round)
        _ = self.scales  # an invalid scale is an error now, not at the end
        self.transport = CountingTransport(
            transport if transport is not None else connect(strategy.workers, device, timeout_s)
        )
        if self.transport.num_workers != strategy.workers:
            raise UserError(
                f"a transport for {self.transport.num_workers} workers, a strategy for {strategy.workers}; match them"
            )
        # Waits for all processes. Two that disagree would later wait for each other, or average different tensors.
        options: dict[str, object] = {"batchnorm": batchnorm, "channels_last": channels_last}
        options |= {"replicate": replicate, "on_nonfinite": on_nonfinite}
        check_agreement(self.transport, job_values(_in_order(strategy), seed, self.chains, full, options))
        tensors = tensors_of(full)
        self.workers: list[Worker] = []
        for index in self.transport.hosted:
            held = [self.plans[chain.name].blocks[index] for chain in self.chains]
            capacities = [len(blocks) for blocks in held]
            subnet = Subnet(full, self.chains, capacities, device=device, channels_last=channels_last)
            subnet.load(tensors, held)
            self.workers.append(Worker(index, subnet))
        self.mark_anchors()
        if strategy.every_step:
            for worker in self.workers:
                worker.model = self.transport.average_gradients(worker.subnet.model)

    @property
    def model(self) -> nn.Module:
        """The sub-network of the only hosted worker; see `Worker.model`.

        Raises:
            UserError: If this process hosts several workers.
        """
        if len(self.workers) != 1:
            raise UserError(
                f"this process hosts {len(self.workers)} workers; loop over job.workers, or start one process for each "
                f"(torchrun --nproc-per-node {self.strategy.workers})"
            )
        return self.workers[0].model

    @property
    def steps_left(self) -> int:
        """Calls of `step` until the next synchronization, including the one that synchronizes."""
        return self.strategy.at(self.round).local_steps - self._steps_in_round

    def plans_of(self, round: int) -> dict[str, Plan]:
        """Draw the plans of one round.

        Args:
            round: Number of the round, from 0.

        Returns:
            Chain name -> plan.
        """
        strategy = self.strategy.at(round)
        return {c.name: strategy.assign(c.num_blocks, c.name, self.seed, round) for c in self.chains}

    def held_by(self, worker: Worker) -> list[tuple[int, ...]]:
        """Return the blocks that a hosted worker holds.

        Args:
            worker: The worker.

        Returns:
            Blocks of each chain: block `held[chain][slot]` is in that slot.
        """
        return [self.plans[chain.name].blocks[worker.index] for chain in self.chains]

    def step(self, *optimizers: Optimizer, nonfinite: Mapping[int, str] | None = None) -> bool:
        """Count a step, and synchronize after `local_steps` of them.

        Call it after each optimizer step. A synchronization waits for all workers, averages, and puts the blocks of the
        next round into the slots. So every process has to call `step` the same number of times, even if a GradScaler
        has skipped an optimizer step.

        Args:
            optimizers: The optimizers of all hosted workers, at least one for each.
            nonfinite: Hosted workers whose round must not count, each with the reason ("a loss of nan in step 7"),
                treated according to `on_nonfinite`. Weights with NaN or inf are found without it.

        Returns:
            True if it has synchronized.

        Raises:
            UserError: If an optimizer is missing, or does not train the parameters of one hosted worker; if a parameter
                was moved out of the flat tensor.
            AgreedError: If `follow` was called in some processes only.
            DivergedError: In all processes, if a worker has diverged; see `on_nonfinite`.
            WorkerLostError: If another process is lost.
        """
        if len(optimizers) < len(self.workers):
            raise UserError(f"{len(optimizers)} optimizers for {len(self.workers)} hosted workers; pass one for each")
        if optimizers != self._optimizers:
            self._adopt(optimizers)
        self.step_index += 1
        self._steps_in_round += 1
        if self.steps_left > 0:
            return False
        self.synchronize(nonfinite)
        return True

    def _adopt(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Assign new optimizers to the workers, and report mistakes before a round of work is lost."""
        subnets = [worker.subnet for worker in self.workers]
        for worker in self.workers:
            worker.subnet.check_attached()
            worker.forget_state()
        for worker, assigned in zip(self.workers, optimizers_of(subnets, optimizers), strict=True):
            worker.optimizers = assigned
        self._optimizers = optimizers

    def follow(self, *averages: AveragedModel) -> None:
        """Exchange averages of the weights over time with their blocks.

        The averages are those of EMA or SWA. Without `follow`, an average of a sub-network mixes the blocks that are in
        a slot one after another. Call it in all processes, before training. At a synchronization the averages are
        averaged over holders and handed over as the weights are, which costs the same number of bytes again (booked as
        "state"). They keep their parameters.

            average = AveragedModel(job.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
            job.follow(average)
            ... optimizer.step(); average.update_parameters(job.model); job.step(optimizer)
            full = job.full_model(batches, averaged=True)

        Args:
            averages: One for each hosted worker, made from its `model`.

        Raises:
            UserError: If their number is wrong, or if one is not an average of its worker's network.
        """
        if len(averages) != len(self.workers):
            raise UserError(f"{len(averages)} averages for {len(self.workers)} hosted workers; pass one for each")
        for worker, average in zip(self.workers, averages, strict=True):
            try:
                worker.average = worker.subnet.twin(average.module)
            except (AttributeError, ValueError) as error:
                raise UserError(
                    f"{type(average).__name__} holds no copy of the network of worker {worker.index}; make it with "
                    "torch.optim.swa_utils.AveragedModel(model)"
                ) from error

    def synchronize(self, nonfinite: Mapping[int, str] | None = None) -> None:
        """End the round now: average, hand over, take the next plan.

        Every process has to call it.

        Args:
            nonfinite: Hosted workers whose round must not count, each with the reason; see `step`.

        Raises:
            UserError: If a parameter was moved out of the flat tensor.
            AgreedError: If `follow` was called in some processes only.
            DivergedError: In all processes, if a worker has diverged; see `on_nonfinite`.
            WorkerLostError: If another process is lost. The sub-networks may then be of neither round.
        """
        strategy = self.strategy.at(self.round)
        for worker in self.workers:
            worker.subnet.check_attached()
        for worker in self.workers:
            worker.collect_state(strategy.optimizer_state)
        payloads = collect_payloads(self.workers, strategy, self._agree_on_round(nonfinite or {}))
        next_plans = self.plans_of(self.round + 1)  # line 6: draw new sub-networks
        kept: Mapping[tuple[int, int], Tensor] = {}
        if not strategy.every_step:
            exchange = Exchange(  # line 5: average each weight over its holders, and hand the blocks over
                self.transport,
                {worker.index: worker.subnet for worker in self.workers},
                payloads=payloads,
                plans=self.plans,
                next_plans=next_plans,
                outer=strategy.outer,
                anchors={worker.index: worker.anchor for worker in self.workers if worker.anchor is not None},
                dropped=self.dropped.keys(),
                replicate=self.replicate,
            )
            exchange.finish()
            kept = exchange.replicas
        self.plans = next_plans
        for worker in self.workers:
            held = self.held_by(worker)
            flats = {payload.name: payload.flats[worker.index] for payload in payloads}
            worker.finish_round(flats, [len(blocks) for blocks in held], held)
        self.round += 1
        self._steps_in_round = 0
        self.mark_anchors()
        if self.replicate:
            held_by_each = [self.held_by(worker) for worker in self.workers]
            replica = collect_replica(self.workers, held_by_each, kept, round=self.round, step=self.step_index)
            keep_newest(self.transport, self.replicas, replica)

    def finish(self) -> None:
        """Synchronize if the present round has steps already.

        So a short last round counts as well. Every process has to call it. See `synchronize` for the errors.
        """
        if self._steps_in_round:
            self.synchronize()

    def full_model(
        self, batches: Iterable[object] | None = None, *, on: int = 0, averaged: bool = False
    ) -> nn.Module | None:
        """Assemble the complete network in eval mode, with scaled branches.

        Ends the present round first (`finish`). Every process has to call it. The network is a copy. The scales are
        forward hooks: deepcopy and pickle keep them, a state dict does not.

        Args:
            batches: Training batches (images, or tuples that begin with them), on which the BatchNorm statistics are
                estimated. Needed with batchnorm="recalibrate" if the network has running statistics.
            on: The worker whose process assembles the network.
            averaged: Assemble the averages that `follow` was given, instead of the weights.

        Returns:
            The network, or None if another process hosts worker `on`.

        Raises:
            UserError: If `on` is not a worker, or if batches or averages are missing.
            WorkerLostError: If another process is lost.
        """
        if not 0 <= on < self.strategy.workers:
            raise UserError(f"on={on} is outside 0 to {self.strategy.workers - 1}, the workers; change it")
        self.finish()
        subnets: dict[int, Subnet] = {}
        for worker in self.workers:
            if (subnet := worker.average if averaged else worker.subnet) is None:
                raise UserError("averaged=True, and there are no averages; give them to job.follow before training")
            subnets[worker.index] = subnet
        full = assemble(self.transport, subnets, self.plans, on)
        if full is None:
            return None
        scale_branches(full.model, self.chains, self.scales)
        if self.batchnorm == "recalibrate" and has_running_statistics(full.model):
            recalibrate(full.model, batches, full.device)
        return full.model.eval()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        self.transport.close()

    def mark_anchors(self) -> None:
        """Copy the weights that begin this round.

        Does nothing unless an option needs them at the end of the round.
        """
        for worker in self.workers:
            worker.begin_round(
                keep_anchor=self.replicate or self.on_nonfinite == "drop",
                outer=self.strategy.at(self.round).outer is not None,
            )

    def _agree_on_round(self, nonfinite: Mapping[int, str]) -> list[str]:
        """Agree on the names of the states to exchange; sets `dropped`. Waits for all processes, and for the device.

        Raises DivergedError if a worker has diverged, unless it may be left out.
        """
        detected = {w.index: "weights that are not finite" for w in self.workers if not all_finite(w.subnet.flat)}
        agreed = agree_on_round(
            self.transport,
            averages=any(worker.average for worker in self.workers),
            state_names={name for worker in self.workers for name in worker.state} - {VELOCITY},
            nonfinite={**detected, **nonfinite},
        )
        self.dropped = agreed.nonfinite
        if self.dropped and (self.on_nonfinite == "stop" or len(self.dropped) == self.strategy.workers):
            worker, reason = min(self.dropped.items())
            raise DivergedError(
                f"worker {worker} has {reason} at the end of round {self.round + 1} (step {self.step_index}): training "
                "diverged; lower the learning rate or let it rise slowly"
            )
        return agreed.state_names

    @property
    def scales(self) -> list[float]:
        """Scale of each chain for the present weights.

        The present weights are those of the round that ended last.
        """
        plans = self.plans_of(max(self.round - 1, 0))
        if isinstance(self.scale, str) and self.scale not in ("inclusion", "1/S"):
            raise UserError(f"scale={self.scale!r} is not one of inclusion, 1/S, or a number")
        scales: list[float] = []
        for chain in self.chains:
            plan = plans[chain.name]
            if not isinstance(self.scale, str):
                scales.append(float(self.scale))
            elif plan.held_by_all or self.scale == "inclusion":
                scales.append(sum(plan.capacities) / plan.workers / plan.num_blocks)
            else:
                scales.append(1 / plan.workers)
        return scales


def _check_options(strategy: Strategy, batchnorm: str, on_nonfinite: str, replicate: bool) -> None:
    if not isinstance(strategy, Strategy):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"strategy={strategy!r} is not a Strategy; give one, as in resist.resist(workers=4)")
    _check_choice("batchnorm", batchnorm, BATCHNORMS)
    for part in _in_order(strategy):
        _check_choice("optimizer_state", part.optimizer_state, OPTIMIZER_STATES)
    _check_choice("on_nonfinite", on_nonfinite, NONFINITE)
    if strategy.every_step and (replicate or on_nonfinite == "drop"):
        raise UserError(
            "ddp averages gradients in every step, and every worker holds all weights; leave out replicate and "
            "on_nonfinite='drop'"
        )
    if replicate and strategy.workers < 2:
        raise UserError(
            "replicate needs a second worker to hold the replicas; give at least 2 workers, or leave it out"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _in_order(strategy: Strategy) -> list[Strategy]:
    """The strategy and those that it switches to, in their order."""
    return [strategy, *(_in_order(strategy.then) if strategy.then is not None else [])]
