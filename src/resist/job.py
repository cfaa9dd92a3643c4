"""Job: ResIST in the user's own training loop; `Job.step` is the only call in it.

    job = Job(build_model, resist(workers=4, local_steps=50))   # draw sub-networks             (Algorithm 1, line 1)
    ... optimizer.step(); job.step(optimizer)                   # l local steps on each         (lines 2 to 4)
                                                                # average, draw the next plan   (lines 5 and 6)
    full = job.full_model(batches)                              # the complete network, scaled

`docs/algorithm.md` maps each line of the algorithm to the code.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resist.blocks.chain import Chain
from resist.blocks.chains import chosen_of, try_runs
from resist.blocks.holdings import log_holdings
from resist.blocks.wrappers import check_blocks
from resist.checking.unchecked import add_depth_hints, note_unchecked
from resist.checking.validate import choose_with_runs
from resist.errors import UserError
from resist.planning.capacities import Given
from resist.planning.members import Members
from resist.planning.plan import Key, RoundPlan, keyed_int
from resist.planning.regrouping import with_members
from resist.planning.strategy import Strategy
from resist.planning.wire import FP32, Wire, as_wire
from resist.state.stateful import load_state_dict, state_dict_of
from resist.subnet.batchnorm import has_running_statistics, recalibrate, use_batch_statistics
from resist.subnet.flats import Flats
from resist.subnet.modes import train_except
from resist.subnet.network import Subnet
from resist.subnet.randomness import seeded_rng, step_seed
from resist.subnet.scaling import chain_scales, scale_branches
from resist.subnet.seeded import build_seeded
from resist.subnet.skeleton import own_storages
from resist.subnet.tensors import values_of
from resist.sync.agreement import check_agreement, job_values, run_everywhere
from resist.sync.distributed import connect
from resist.sync.full_network import full_network
from resist.sync.gathering import TogetherIn
from resist.sync.local import Unconnected
from resist.sync.optimizers import check_optimizers
from resist.sync.options import check_options, note_wire
from resist.sync.regrouping import move
from resist.sync.replicas import Replica, collect_replica, keep_newest
from resist.sync.round_agreement import agree_on_round
from resist.sync.round_end import RoundEnd
from resist.sync.round_start import RoundStart, begin_round, first_blocks, first_buffers, with_start, worker_start
from resist.sync.streaming import Streaming
from resist.sync.synchronization import collect, exchange
from resist.sync.target import Regrouped, Target, agree_on_target
from resist.sync.traffic import CountingTransport
from resist.sync.transport import Transport
from resist.sync.worker import Worker, assign_optimizers


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
        chains: Names of the chains to partition, such as "layer3:1-22" or "layer3", or "all" for all that can be
            partitioned together. Default: the longest run of interchangeable residual blocks.
        seed: Seed of the initial weights and of the plans.
        batchnorm: BatchNorm statistics of the full network. "recalibrate": running statistics are averaged over
            holders, and `full_model(batches)` estimates them again on the scaled network. "average": only averaged.
            "batch": no running statistics, as in the authors' code; the network uses the statistics of each batch, at
            test time too.
        scale: Factor of each chain block's branch in the full network. "inclusion": the probability that a worker holds
            the block, mean capacity / num_blocks. "1/S": one over the number of workers. Or a number above 0.
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
        elastic: Keep what `regroup` needs, so that the job can go on without workers that are lost, and with others
            that join. Needs memory for one more copy of the worker's weights (the one of `replicate`), of its average
            over time, and of the outer momentum.
        wire: Format of what is sent: "fp32", "bf16", "int8", "int6", "int4", or a `resist.Wire` with one for each part,
            and with fragments that are averaged while training goes on. Needs memory for two more copies of the
            worker's shared part, with "fp32" for one if there are fragments.
        resume_at: (round, step) to continue an interrupted job at; see `resist.runs.checkpoint`.
        example: One batch, from which the network is checked: a tensor; a tuple or list, whose items are the positional
            arguments of the network, or if it does not take them the first item alone; a dict of keyword arguments; or
            a function that calls a network, `lambda model: model(batch, steps=3)`. Blocks are tried with the arguments
            that they get with it, and a network whose sub-networks would compute something else is refused, see
            `resist.checking.validate`. This runs on copies of the network, on the CPU; processes may have different
            batches. Default: blocks are tried with guesses, and nothing else is checked, which is logged once. False:
            the same, without a word.

    Attributes:
        workers: The hosted workers, ascending.
        strategy: The strategy, for the present workers.
        given: The strategy as it was given.
        members: The present workers.
        generation: How often the members have changed; -1 in a process that has not joined yet.
        wire: The formats of what is sent.
        chains: The chains that are partitioned.
        plan: Plan of the present round, with the chains in the order of `chains`.
        round: The round that the next step belongs to, counted from 0.
        step_index: Steps done.
        begun: Whether a step was counted, or a state was loaded.
        transport: The transport, which counts bytes and messages; see `take` there.
        dropped: Workers that were left out of the last synchronization, each with the reason.
        replicas: Weights of the last synchronized network that this process keeps, if `replicate`; the newest is last.
        starts: What `regroup` can return to, if `elastic`.
        torn: Whether the weights are those of no round, since another process was lost in an exchange.

    Raises:
        UserError: If an option is invalid, if the network has no chain that the strategy can partition, or if the
            process group cannot be formed within `timeout_s`.
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
        elastic: bool = False,
        wire: str | Wire = FP32,
        resume_at: tuple[int, int] = (0, 0),
        example: object = None,
    ) -> None:
        self.wire = as_wire(wire)
        needs_two = replicate and not elastic  # where others may join
        check_options(strategy, batchnorm=batchnorm, on_nonfinite=on_nonfinite, replicate=needs_two, wire=self.wire)
        if elastic:
            with_members(strategy, Members.first(strategy.workers))  # an error now, not when the first worker is lost
        self.strategy, self.seed = strategy, seed
        self.given: Strategy = strategy
        self.batchnorm, self.scale = batchnorm, scale
        self.members = Members.first(strategy.workers)
        self.generation = -1 if isinstance(transport, Unconnected) else 0
        self.starts: list[RoundStart] = []
        self.torn = False  # in an exchange, or lost in one
        self.on_nonfinite, self.replicate, self.timeout_s = on_nonfinite, replicate, timeout_s
        self.elastic = elastic
        self.replicas: list[Replica] = []
        self.dropped: dict[int, str] = {}
        self.round, self.step_index = resume_at
        self._steps_in_round = 0
        self.begun = False
        self._optimizers: tuple[Optimizer, ...] = ()
        self._streaming: Streaming | None = None  # in a round with fragments
        full = build_seeded(build_model, seed)
        if batchnorm == "batch":
            use_batch_statistics(full)
        options: dict[str, object] = {"batchnorm": batchnorm, "channels_last": channels_last}
        options |= {"replicate": replicate, "elastic": elastic, "on_nonfinite": on_nonfinite, "resume_at": resume_at}
        options |= {"wire": self.wire.formats, "fragments": self.wire.fragments, "delay": self.wire.delay}
        self.transport = CountingTransport(transport or connect(strategy.workers, device, timeout_s))
        try:
            # Waits for all processes. Each may have another example, and two that disagree would later wait for each
            # other, or average different tensors.
            self.chains, runs = run_everywhere(self.transport, lambda: self._draw_first(full, chains, example))
            self.started_with = job_values(strategy, seed=seed, chains=self.chains, model=full, options=options)
            check_agreement(self.transport, self.started_with)
            del self.started_with["resume_at"]  # who joins later begins where the others are
        except BaseException:
            if transport is None:
                self.transport.close()
            raise
        self.workers: list[Worker] = []
        for index in self.transport.hosted:
            self.workers.append(self._host(index, full, device, channels_last))
        unchecked = example is None or example is False
        if unchecked and strategy.ever_partitions:
            add_depth_hints((worker.subnet.model for worker in self.workers), self.chains)
        values = values_of(full) if elastic and replicate else {}
        self.first_buffers: Mapping[Key, Mapping[str, Tensor]] = first_buffers(
            values, self.chains, self.workers[0].subnet
        )
        self.mark_anchors(replicas=first_blocks(values, self.chains, self.plan, self.workers) if values else {})
        if 0 in self.transport.hosted and self.generation >= 0:  # not in a process that joins
            log_holdings(full, self.chains, strategy, runs)
            note_wire(self.wire, self.workers[0].subnet)
            if example is None:
                note_unchecked()

    def _draw_first(
        self, full: nn.Module, chains: str | Sequence[str], example: object
    ) -> tuple[tuple[Chain, ...], tuple[Chain, ...]]:
        """Line 1 of the algorithm: choose chains and draw sub-networks.

        Returns:
            The chains, and all runs of blocks that were tried.
        """
        if (hosted := self.transport.num_workers) != self.strategy.workers:
            raise UserError(f"a transport for {hosted} workers, a strategy for {self.strategy.workers}; match them")
        names = (chains,) if isinstance(chains, str) else tuple(chains)
        needed = self.strategy.ever_partitions
        if example is None or example is False:
            runs = try_runs(full)
            found = chosen_of(runs, full, names, needed=needed)
        else:
            found, runs = choose_with_runs(full, names, example, needed=needed)
        check_blocks(full, (n for chain in found for block in range(chain.num_blocks) for n in chain.members(block)))
        self.plan = self.strategy.plan(found, seed=self.seed, round=self.round)
        chain_scales(self.scale, self.plan)  # an invalid scale is an error now, not at the end
        return found, runs

    def _host(self, index: int, full: nn.Module, device: torch.device | str, channels_last: bool) -> Worker:
        """Line 1 of the algorithm: give a worker its sub-network."""
        like = self.workers[0].subnet if self.workers else None
        capacities = self.plan.capacities(index)
        subnet = Subnet(full, self.chains, capacities, device=device, channels_last=channels_last, like=like)
        subnet.load(values_of(full), self.plan.held(index))
        worker = Worker(index, subnet)
        if self.strategy.every_step:
            worker.model = self.transport.average_gradients(subnet.model)
        return worker

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

    def plan_of(self, round: int) -> RoundPlan:
        """Draw the plan of one round.

        Args:
            round: Number of the round, from 0.

        Returns:
            The plan, with the chains in the order of `chains`.
        """
        return self.strategy.plan(self.chains, seed=self.seed, round=round)

    def change_capacities(self, capacities: Given) -> None:
        """Let the workers hold other numbers of blocks from the next round on.

        Every process has to call it with the same capacities, in the same round. Where measured times decide, see
        `resist.planning.balance`.

        Args:
            capacities: As in `resist.resist`, for the present workers.

        Raises:
            UserError: If they do not fit the workers or the chains, or the workers are others than those that the
                strategy was given. With fragments also if every worker would begin, or cease, to hold all blocks: this
                round, whose fragments are on their way, would have to be averaged at its end.
        """
        if self.members != Members.first(self.given.workers):
            raise UserError("the workers have changed, and their capacities follow; leave out `change_capacities`")
        changed = self.strategy.with_capacities(capacities, from_round=self.round + 1)
        next_plan = changed.plan(self.chains, seed=self.seed, round=self.round + 1)
        if self._streaming is not None and next_plan.held_by_all != self.plan.held_by_all:
            raise UserError(
                f"with `fragments={self.wire.fragments}`, whether every worker holds all blocks is fixed when a round "
                "begins; give such capacities to the strategy, as in resist.Capacities(by_round=...)"
            )
        self.strategy = self.given = changed

    def step_seed(self, worker: int | None = None) -> int:
        """Return the seed of everything that a worker draws next.

        The masks of dropout and drop path, for example.

        A function of the job's seed, the worker and the number of steps done. So workers draw different masks, equal
        runs are equal, and a job that was loaded continues exactly:

            torch.manual_seed(job.step_seed())
            loss = F.cross_entropy(job.model(images), labels)

        Args:
            worker: Number of the worker. Default: the only hosted one.

        Returns:
            A 63-bit integer.

        Raises:
            UserError: If `worker` is missing where this process hosts several workers, or is not hosted here.
        """
        hosted = [worker.index for worker in self.workers]
        if worker is None and len(hosted) == 1:
            worker = hosted[0]
        if worker not in hosted:
            raise UserError(f"step_seed(worker={worker}): this process hosts the workers {hosted}; give one of them")
        return step_seed(self.seed, worker, self.step_index)

    def step(self, *optimizers: Optimizer, nonfinite: Mapping[int, str] | None = None) -> bool:
        """Count a step, and synchronize after `local_steps` of them.

        Call it after each optimizer step. A synchronization waits for all workers, averages, and puts the blocks of the
        next round into the slots. So every process has to call `step` the same number of times, even if a GradScaler
        has skipped an optimizer step. With fragments, steps within the round begin and finish their means: the weights
        then change in `step`, too.

        Args:
            optimizers: The optimizers of all hosted workers, at least one for each.
            nonfinite: Hosted workers whose round must not count, each with the reason ("a loss of nan in step 7"),
                treated according to `on_nonfinite`. Only the call that synchronizes reads it. Weights with NaN or inf
                are found without it.

        Returns:
            True if it has synchronized.

        Raises:
            UserError: If an optimizer is missing, or does not train the parameters of one hosted worker; if a parameter
                was moved out of the flat tensor; if `nonfinite` has a worker that is not hosted here.
            AgreedError: If `follow` was called in some processes only.
            DivergedError: In all processes, if a worker has diverged; see `on_nonfinite`.
            WorkerLostError: If another process is lost.
        """
        if optimizers != self._optimizers or not optimizers:
            self.attach(*optimizers)
        if self._steps_in_round == 0:
            check_optimizers(optimizers, self.strategy)  # they have made a step, and so have their state
            for worker in self.workers:
                worker.note_modes()
        self.begun = True
        self.step_index += 1
        self._steps_in_round += 1
        if self.steps_left > 0:
            if self._streaming is not None:
                self._streaming.step(self._steps_in_round)
            return False
        self.synchronize(nonfinite)
        return True

    def attach(self, *optimizers: Optimizer) -> None:
        """Tell the job the optimizers of its workers.

        `step` does so as well. Call it before `load_state_dict`, which fills them.

        Args:
            optimizers: As in `step`.

        Raises:
            UserError: If an optimizer is missing, or does not train the parameters of one hosted worker.
        """
        if len(optimizers) < len(self.workers):
            raise UserError(f"{len(optimizers)} optimizers for {len(self.workers)} hosted workers; pass one for each")
        if optimizers != self._optimizers:
            assign_optimizers(self.workers, optimizers, self.strategy, self.transport.num_processes)
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
            worker.follow(average)

    def synchronize(self, nonfinite: Mapping[int, str] | None = None) -> None:
        """End the round now: average, hand over, take the next plan.

        Every process has to call it.

        Args:
            nonfinite: Hosted workers whose round must not count, each with the reason; see `step`.

        Raises:
            UserError: If a parameter was moved out of the flat tensor, if `nonfinite` has a worker that is not hosted
                here, or if the last synchronization was not completed.
            AgreedError: If `follow` was called in some processes only.
            DivergedError: In all processes, if a worker has diverged; see `on_nonfinite`.
            WorkerLostError: If another process is lost. The sub-networks may then be of neither round.
        """
        if self.torn:
            raise UserError(
                "the last synchronization was not completed, and the weights are those of no round; call job.regroup "
                "(`elastic=True`), or go on from a checkpoint"
            )
        streamed: frozenset[int] | None = None
        if self._streaming is not None:
            self._streaming.complete()
            streamed = frozenset(self._streaming.done)
        end = self._round_end(streamed)
        agreed = agree_on_round(self.transport, self.workers, end, nonfinite or {})
        self.dropped, replicas = agreed.nonfinite, dict[Key, Flats]()
        collect(self.workers, end, agreed, on_nonfinite=self.on_nonfinite)
        if not end.strategy.every_step:  # line 5: average each weight over its holders, and hand the blocks over
            self.torn = True
            replicas = exchange(self.transport, self.workers, end, agreed, replicate=self.replicate)
        self.plan, self.round, self._steps_in_round = end.next_plan, self.round + 1, 0
        self._begin_round(replicas, agreed=not streamed)

    def _round_end(self, streamed: frozenset[int] | None = None) -> RoundEnd:
        """Line 6 of the algorithm: the end of this round, with new sub-networks."""
        strategy, next_plan = self.strategy.at(self.round), self.plan_of(self.round + 1)
        return RoundEnd(self.round, self.step_index, strategy, self.plan, next_plan, self.wire, self.seed, streamed)

    def _begin_round(self, replicas: Mapping[Key, Flats], *, agreed: bool = True) -> None:
        """Keep what begins a round. With `replicate` or `elastic`, waits until all processes have it."""
        self.mark_anchors(agreed=agreed, replicas=replicas)
        self.torn = False
        if self.replicate:
            own = collect_replica(self.workers, plan=self.plan, blocks=replicas, round=self.round, step=self.step_index)
            keep_newest(self.transport, self.replicas, own)
        elif self.elastic:
            self.transport.all_gather_text("kept")
        del self.starts[:-1]

    def regroup(self, transport: Transport, *, kept: Sequence[int] | None = None, most: int | None = None) -> Regrouped:
        """Go on with other members: without processes that were lost, and with others that join.

        Call it in all members after a WorkerLostError, or between two steps: in those that stay, and in those that
        join, whose job was made in the same way, but with `transport=Unconnected(S)`. If it raises WorkerLostError
        itself, call it again with a transport of the members that are left.

        All go on from one point. If nobody is in the middle of an exchange, the weights stay, and the round ends now.
        Otherwise all return to the beginning of the round, their optimizers start over, and the round is repeated.
        Blocks that only lost workers held return to the beginning of the round, from replicas that `replicate` keeps;
        optimizers have no state of them. The capacities follow the new number of workers. `step_index` becomes the step
        at which they have seen as many images. Afterwards all workers have equal shared parts: fragments that are on
        their way are given up, and the errors of wire formats begin at zero.

        Args:
            transport: Connects the new members. The former one is not used any more, and not closed.
            kept: The workers of this process that stay, by their present numbers, in the order of the new ones.
                Default: all of them.
            most: Blocks of a chain that each worker of this process may hold at most. Default: no bound.

        Returns:
            What has become of the members. Their numbers are in `workers[i].index`, the number of workers in
            `strategy.workers`.

        Raises:
            UserError: If the job is not `elastic`.
            AgreedError: In all processes, if they do not fit each other, if the workers may not hold all blocks, or if
                `kept` has a worker that is not hosted there.
            IncompleteNetworkError: In all processes, if a part of the network was lost.
            DivergedError: In all processes, if a worker has diverged; see `on_nonfinite`.
            WorkerLostError: If another process is lost.
        """
        if not self.elastic:
            raise UserError("this job keeps nothing to regroup from; give Job `elastic=True`")
        counted = CountingTransport(transport)
        target, workers = agree_on_target(self, counted, kept, most)
        self.torn, self._streaming = True, None
        replicas = move(self, counted, workers, target)
        counted.follow(self.transport, target.regrouping.former)
        self.transport, self.workers = counted, workers
        self._go_on(target)
        self._begin_round(replicas)
        return target.result

    def _go_on(self, target: Target) -> None:
        """Take over the numbers of a regrouped job."""
        result = target.result
        self.strategy, self.members, self.plan = target.strategy, target.members, target.end.next_plan
        self.generation, self.round, self.step_index = result.generation, result.round, result.step
        self._steps_in_round, self.begun = 0, True
        for worker in self.workers:
            if worker.averaged is not None and worker.index in result.joined:
                worker.averaged.n_averaged.fill_(target.averaged)

    def finish(self) -> None:
        """Synchronize if the present round has steps already.

        So a short last round counts as well. Every process has to call it. See `synchronize` for the errors.
        """
        if self._steps_in_round:
            self.synchronize()

    def full_model(
        self, batches: Iterable[object] | None = None, *, on: int | None = 0, averaged: bool = False
    ) -> nn.Module | None:
        """Assemble the complete network in eval mode, with scaled branches.

        Ends the present round first (`finish`). Every process has to call it. The network is a copy. The scales are
        forward hooks: deepcopy and pickle keep them, a state dict does not. Where workers differ in what they have
        trained since fragments were averaged, the network has their mean, and they stay as they are.

        Args:
            batches: Training batches on which the BatchNorm statistics are estimated: images, dictionaries of the
                network's keyword arguments, or tuples that begin with one of these. Needed with
                batchnorm="recalibrate" if the network has running statistics. A last batch of one example is part of
                the batch before it.
            on: The worker whose process assembles the network. None: every process does, and estimates on a share of
                `batches`, which are the same in all of them; all get the same network.
            averaged: Assemble the averages that `follow` was given, instead of the weights.

        Returns:
            The network, or None if another process hosts worker `on`.

        Raises:
            UserError: If `on` is not a worker, or if batches or averages are missing.
            AgreedError: With `on=None` in all processes, if one of them cannot use a batch.
            WorkerLostError: If another process is lost.
        """
        if on is not None and not 0 <= on < self.strategy.workers:
            raise UserError(f"on={on} is outside 0 to {self.strategy.workers - 1}, the workers; change it")
        self.finish()
        together = self.together if on is None else None
        targets = [on] if on is not None else self.together.first_workers
        full = full_network(self.transport, self.workers, self.plan, on=targets, averaged=averaged)
        if full is None:
            return None
        scale_branches(full.model, self.chains, self.scales)
        train_except(full.model, full.place, full.frozen_modules)
        if self.batchnorm == "recalibrate" and has_running_statistics(full.model):
            # What the network and the batches draw here must not change the training that goes on.
            seed = keyed_int("full model", self.seed, self.round)
            with seeded_rng(seed, full.device):
                recalibrate(full.model, batches, full.device, seed=seed, processes=together)
        own_storages(full.model)
        return full.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return this process's state of the job between two rounds.

        The form is that of `torch.distributed.checkpoint`: save it there as `{"job": job}`, from all processes. Or save
        it by `resist.save_checkpoint`, which needs no such library and can be loaded with other optimizers or none.

        Returns:
            "weights", averages and outer momentum by global dotted name, copies in CPU memory; "about" and "workers" as
            one value each. A job that has not begun assembles the whole network, to be loaded into: then every process
            has to call it.

        Raises:
            UserError: In the middle of a round; if a value of an optimizer's state cannot be saved.
        """
        return state_dict_of(self, complete=not self.begun)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a job, in every process.

        Call `attach` before, and `follow` if there are averages. With other workers, chains or capacities than those of
        the state, the network, its averages and the outer momentum are taken over, and the optimizers start over.

        Args:
            state: What `state_dict` has returned in this process, or what `torch.distributed.checkpoint` has loaded.

        Raises:
            AgreedError: In all processes, if one of them cannot use the state: it is that of another network, of other
                optimizers, or damaged.
        """
        load_state_dict(self, state)

    def continue_at(self, round: int, step: int) -> None:
        """Set round and step, without the weights: `load_state_dict` and `resist.load_checkpoint` call it.

        Args:
            round: Rounds done.
            step: Optimizer steps done.
        """
        self.plan, self.round, self.step_index, self._steps_in_round = self.plan_of(round), round, step, 0
        self.begun, self.torn, self.dropped = True, False, {}
        self.replicas.clear()
        self.starts.clear()
        self._streaming = None  # what is on its way is not waited for: it belongs to weights that are gone
        self.mark_anchors()

    def close(self) -> None:
        """Leave the process group, if there is one. Does not wait for a fragment that is on its way."""
        self._streaming = None
        self.transport.close()

    def mark_anchors(self, *, agreed: bool = True, replicas: Mapping[Key, Flats] | None = None) -> None:
        """Copy the weights that begin this round.

        Drops the copies of the last round if no option needs new ones at the end of this one.

        Args:
            agreed: All workers have equal weights. Otherwise they agree on the anchors of their fragments, which stay.
            replicas: Replicas of blocks that this process keeps, as they begin the round.
        """
        drops = self.on_nonfinite == "drop"
        self._streaming = begin_round(
            self.transport,
            self.workers,
            self._round_end(),
            keep_anchor=self.elastic or self.replicate or drops,
            keep_average=self.elastic or drops,
            agreed=agreed,
        )
        if self.elastic and self.generation >= 0:
            own = tuple(worker_start(worker, self.plan.held(worker.index)) for worker in self.workers)
            numbers = self.generation, self.round, self.step_index
            self.starts = with_start(self.starts, RoundStart(*numbers, self.members, own, replicas or {}))

    @property
    def steps_in_round(self) -> int:
        """Steps done in the present round."""
        return self._steps_in_round

    @property
    def together(self) -> TogetherIn:
        """The processes, for work that they share."""
        return TogetherIn(self.transport, self.workers[0].subnet.device)

    @property
    def scales(self) -> list[float]:
        """Scale of each chain for the present weights.

        The present weights are those of the round that ended last.
        """
        return chain_scales(self.scale, self.plan_of(max(self.round - 1, 0)))
