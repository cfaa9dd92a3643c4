"""Job: ResIST as a user meets it. The training loop stays the user's; `step` is the only call in it.

job = Job(build_model, resist(workers=4, local_steps=50))       # draw sub-networks            (Algorithm 1, line 1)
... optimizer.step(); job.step(optimizer)                       # l local steps on each        (lines 2 to 4)
                                                                # average, draw anew, go on    (lines 5 and 6)
full = job.full_model()                                         # the whole network, scaled
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resist.errors import AgreedError, DivergedError, UserError
from resist.planning.plan import Plan
from resist.planning.strategy import Strategy
from resist.subnet.batchnorm import BATCHNORMS, has_running_statistics, recalibrate, use_batch_statistics
from resist.subnet.chains import choose_chains
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.scaling import scale_branches
from resist.subnet.seeded import build_seeded, fingerprint
from resist.sync.agreement import check_agreement
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS, all_finite
from resist.sync.distributed import connect
from resist.sync.exchange import Exchange, Payload, assembly
from resist.sync.optimizer_state import OPTIMIZER_STATES, optimizers_of
from resist.sync.traffic import CountingTransport
from resist.sync.transport import Transport
from resist.sync.worker import Replica, Worker

NONFINITE = ("stop", "drop")


class Job:
    """Trains the network that `build_model()` returns, by a strategy, as one of its workers (or several).

    build_model: called once, on the host, with torch's generator seeded by `seed` and restored afterwards. Every
                 process builds the same network and keeps only its own part of it.
    strategy:    see `resist.planning.strategy`.
    chains:      what to partition, as in `("layer3:1-22",)`; default: the longest run of interchangeable blocks.
    batchnorm:   "recalibrate": running statistics are averaged over holders, and `full_model(batches)` estimates them
                 anew on the scaled network; "average": the former only; "batch": none, as in the authors' code: the
                 network uses the statistics of each batch, at test time too.
    scale:       what a chain block's branch is multiplied by in the full network: "inclusion" (mean capacity /
                 num_blocks), "1/S", or a number.
    transport:   default: torch.distributed where this process was started for it, else this process hosts all workers.

    on_nonfinite: "stop": DivergedError, in all processes, when a worker's weights are no longer finite at the end of a
                 round; "drop": its round is left out of the means, and blocks that only it held stay as they were.
                 `dropped` says who was left out of the round that ended last, and why. Takes memory for the weights
                 with which a round began.
    replicate:      keep each block twice, as it was synchronized, until the next synchronization is over, so that the
                 network is complete without any one worker: `safe` is what this process keeps. Takes memory for the
                 weights that a worker holds, and for blocks that it handed over.
    resume_at:   (round, step) at which a job goes on that was interrupted; see `resist.runs.checkpoint`.

    workers: the hosted ones; `model` is the sub-network where there is only one.
    step_index, round: steps done; the round that the next step belongs to.
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
        if not isinstance(strategy, Strategy):
            raise UserError(f"strategy={strategy!r} is not a Strategy; give one, as in resist.resist(workers=4)")
        _one_of("batchnorm", batchnorm, BATCHNORMS)
        for part in _parts(strategy):
            _one_of("optimizer_state", part.optimizer_state, OPTIMIZER_STATES)
        _one_of("on_nonfinite", on_nonfinite, NONFINITE)
        if strategy.every_step and (replicate or on_nonfinite == "drop"):
            raise UserError(
                "ddp averages gradients in every step, and every worker holds all weights; leave out replicate and "
                "on_nonfinite='drop'"
            )
        if replicate and strategy.workers < 2:
            raise UserError(
                "replicate needs a second worker to hold the replicas; give at least 2 workers, or leave it out"
            )
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
        _ = self.scales  # complains about a wrong scale now rather than at the end
        self.transport = CountingTransport(
            transport if transport is not None else connect(strategy.workers, device, timeout_s)
        )
        if self.transport.num_workers != strategy.workers:
            raise UserError(
                f"a transport for {self.transport.num_workers} workers, a strategy for {strategy.workers}; match them"
            )
        self._agree(full, channels_last)
        tensors = tensors_of(full)
        self.workers: list[Worker] = []
        for index in self.transport.hosted:
            held = [self.plans[chain.name].blocks[index] for chain in self.chains]
            subnet = Subnet(full, self.chains, [len(h) for h in held], device=device, channels_last=channels_last)
            subnet.load(tensors, held)
            self.workers.append(Worker(index, subnet))
        self.mark_anchors()
        if strategy.every_step:
            for worker in self.workers:
                worker.model = self.transport.average_gradients(worker.subnet.model)

    @property
    def model(self) -> nn.Module:
        if len(self.workers) != 1:
            raise UserError(
                f"this process hosts {len(self.workers)} workers; loop over job.workers, or start one process for each "
                f"(torchrun --nproc-per-node {self.strategy.workers})"
            )
        return self.workers[0].model

    @property
    def steps_left(self) -> int:
        """Calls of `step` until the next synchronization, that one included."""
        return self.strategy.at(self.round).local_steps - self._steps_in_round

    def plans_of(self, round: int) -> dict[str, Plan]:
        """The plan of each chain in `round`."""
        strategy = self.strategy.at(round)
        return {c.name: strategy.assign(c.num_blocks, c.name, self.seed, round) for c in self.chains}

    def step(self, *optimizers: Optimizer, nonfinite: Mapping[int, str] | None = None) -> bool:
        """Call it after each optimizer step, with the optimizers of every hosted worker: one each, or more.

        After `local_steps` calls it synchronizes: waits for all workers, averages, and puts the next round's blocks
        into the slots. Every worker has to call it equally often, also where a GradScaler left a step out.

        nonfinite: hosted workers whose round must not count, each with the reason ("a loss of nan in step 7"), treated
             as `on_nonfinite` says; weights that are not finite are found without it.

        Returns whether it synchronized.
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
        """Look at the optimizers, once: mistakes are named here, before a round of work is done in vain."""
        for worker in self.workers:
            worker.subnet.check_attached()
            worker.state = {kind: flat for kind, flat in worker.state.items() if kind == VELOCITY}
        for worker, own in zip(
            self.workers, optimizers_of([worker.subnet for worker in self.workers], optimizers), strict=True
        ):
            worker.optimizers = own
        self._optimizers = optimizers

    def follow(self, *averages: AveragedModel) -> None:
        """Let averages of the weights, as an EMA, go where their blocks go. Call it in all processes, before training.

        Without it, an average kept beside a sub-network mixes the blocks that lie in a slot one after another.

            average = AveragedModel(job.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
            job.follow(average)
            ... optimizer.step(); average.update_parameters(job.model); job.step(optimizer)
            full = job.full_model(batches, averaged=True)

        averages: one for each hosted worker. At a synchronization they are folded and handed over as the weights are,
                  which costs as many bytes again (booked as "state"). They go on through the same parameters.
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
        """End the round now: fold, hand over, go on with the next plan. Every worker has to call it.

        nonfinite: hosted workers whose round must not count, each with the reason; see `step`.
        """
        strategy = self.strategy.at(self.round)
        next_plans = self.plans_of(self.round + 1)
        subnets = {worker.index: worker.subnet for worker in self.workers}
        for subnet in subnets.values():
            subnet.check_attached()
        payloads = self._payloads(strategy, nonfinite or {})
        replicas: Mapping[tuple[int, int], Tensor] = {}
        if not strategy.every_step:
            exchange = Exchange(
                self.transport,
                subnets,
                payloads,
                self.plans,
                next_plans,
                strategy.outer,
                {worker.index: worker.anchor for worker in self.workers if worker.anchor is not None},
                self.dropped.keys(),
                self.replicate,
            )
            exchange.finish()
            replicas = exchange.replicas
        for worker in self.workers:
            capacities = [next_plans[chain.name].capacities[worker.index] for chain in self.chains]
            held = [next_plans[chain.name].blocks[worker.index] for chain in self.chains]
            worker.go_on({one.name: one.flats[worker.index] for one in payloads}, capacities, held)
        self.plans = next_plans
        self.round += 1
        self._steps_in_round = 0
        self.mark_anchors()
        if self.replicate:
            self._keep_replicas(replicas)

    def finish(self) -> None:
        """Fold the last, short round, if steps are open. Nothing that a worker learned is left out."""
        if self._steps_in_round:
            self.synchronize()

    def full_model(
        self, batches: Iterable[object] | None = None, *, on: int = 0, averaged: bool = False
    ) -> nn.Module | None:
        """The complete network, its chain blocks' branches scaled, in eval mode. Every worker has to call it.

        Ends a round that is under way. Only the process that hosts worker `on` assembles it; the others get None.
        It is a copy. The scales are forward hooks: deepcopy and pickle keep them, a state dict does not.

        batches: training batches (images, or tuples that begin with them) to estimate the BatchNorm statistics on:
                 needed for batchnorm="recalibrate" where the network has such layers.
        averaged: of the averages that `follow` was given, instead of the weights.
        """
        if not 0 <= on < self.strategy.workers:
            raise UserError(f"on={on} is outside 0 to {self.strategy.workers - 1}, the workers; change it")
        self.finish()
        subnets: dict[int, Subnet] = {}
        for worker in self.workers:
            if (subnet := worker.average if averaged else worker.subnet) is None:
                raise UserError("averaged=True, and there are no averages; give them to job.follow before training")
            subnets[worker.index] = subnet
        full, own = None, subnets.get(on)
        if own is not None:
            full = Subnet(
                own.model,
                self.chains,
                [chain.num_blocks for chain in self.chains],
                device=own.device,
                channels_last=own.channels_last,
                template_capacities=own.capacities,
            )
            full.hold([range(chain.num_blocks) for chain in self.chains])
            with torch.no_grad():
                full.shared.copy_(own.shared)
        assembly(self.transport, subnets, self.plans, full, on).finish()
        if full is None or own is None:
            return None
        scale_branches(full.model, self.chains, self.scales)
        if self.batchnorm == "recalibrate" and has_running_statistics(full.model):
            recalibrate(full.model, batches, own.device)
        return full.model.eval()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        self.transport.close()

    def mark_anchors(self) -> None:
        """Remember the weights with which this round begins, where something will ask for them."""
        for worker in self.workers:
            worker.begin(
                keep_anchor=self.replicate or self.on_nonfinite == "drop",
                outer=self.strategy.at(self.round).outer is not None,
            )

    @torch.no_grad()
    def _keep_replicas(self, replicas: Mapping[tuple[int, int], Tensor]) -> None:
        """Keep what this process has of the synchronized network; forget the copy before when all have theirs.

        Waits for all processes. If one is lost now, the others still have the one copy or the other, complete.
        """
        tensors: dict[str, Tensor] = {}
        for worker in self.workers:
            tensors |= worker.subnet.state(self.held_by(worker), worker.anchor)
        layouts = self.workers[0].subnet.block_layouts
        for (number, block), flat in replicas.items():
            name = self.chains[number].block_name(block)
            tensors |= {f"{name}.{key}": piece.view(flat) for key, piece in layouts[number].pieces.items()}
        self.replicas.append(Replica(self.round, self.step_index, tensors))
        self.transport.all_gather_text("kept")
        del self.replicas[:-1]

    def held_by(self, worker: Worker) -> list[tuple[int, ...]]:
        """The blocks of each chain that a hosted worker holds, in the order of its slots."""
        return [self.plans[chain.name].blocks[worker.index] for chain in self.chains]

    def _payloads(self, strategy: Strategy, nonfinite: Mapping[int, str]) -> list[Payload]:
        """What is exchanged at the end of this round. Waits for all processes, to agree on it."""
        policy, averages = strategy.optimizer_state, {w.index: w.average.flat for w in self.workers if w.average}
        for worker in self.workers:
            worker.collect_state(policy)
        payloads = [Payload(WEIGHTS, {w.index: w.subnet.flat for w in self.workers}, moves=True, average_shared=True)]
        for kind in self._agree_on_round(nonfinite):
            flats = {w.index: w.state.setdefault(kind, torch.zeros_like(w.subnet.flat)) for w in self.workers}
            payloads.append(
                Payload(kind, flats, moves=policy in ("travel", "average"), average_shared=policy == "average")
            )
        if averages:
            payloads.append(Payload(AVERAGE, averages, moves=True, average_shared=True))
        if strategy.outer:
            velocities = {worker.index: worker.state[VELOCITY] for worker in self.workers}
            payloads.append(Payload(VELOCITY, velocities, moves=True, average_shared=False, average_blocks=False))
        return payloads

    def _agree_on_round(self, nonfinite: Mapping[int, str]) -> list[str]:
        """The kinds of optimizer state that any worker has; sets `dropped`. Waits for all processes.

        A worker has no state yet where a GradScaler left all its steps out; what moves has to be the same list
        everywhere. Raises DivergedError where weights are no numbers, unless such workers may be left out.
        """
        found = {w.index: "weights that are not finite" for w in self.workers if not all_finite(w.subnet.flat)}
        mine = {
            "averages": any(worker.average for worker in self.workers),
            "kinds": sorted({kind for worker in self.workers for kind in worker.state} - {VELOCITY}),
            "nonfinite": {**found, **nonfinite},
        }
        told = [json.loads(text) for text in self.transport.all_gather_text(json.dumps(mine))]
        if len({one["averages"] for one in told}) > 1:
            raise AgreedError("job.follow was called in some processes and not in others; call it in all of them")
        self.dropped = {int(worker): reason for one in told for worker, reason in one["nonfinite"].items()}
        if self.dropped and (self.on_nonfinite == "stop" or len(self.dropped) == self.strategy.workers):
            worker, reason = min(self.dropped.items())
            raise DivergedError(
                f"worker {worker} has {reason} at the end of round {self.round} (step {self.step_index}): training "
                "diverged; lower the learning rate or let it rise slowly"
            )
        return sorted({kind for one in told for kind in one["kinds"]})

    @property
    def scales(self) -> list[float]:
        """The scale of each chain, for the weights as they are now (those of the round that ended last)."""
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

    def _agree(self, full: nn.Module, channels_last: bool) -> None:
        """Compare with the other processes what must be equal, before anything hangs or aborts because it is not."""
        network = fingerprint(full)
        mine = {  # causes before what follows from them: the first difference is the one that is named
            "workers": self.strategy.workers,
            "strategy": [(s.name, s.local_steps, s.optimizer_state, s.at_round) for s in _parts(self.strategy)],
            "seed": self.seed,
            "batchnorm": self.batchnorm,
            "channels_last": channels_last,
            "replicate": self.replicate,
            "on_nonfinite": self.on_nonfinite,
            "model": network["structure"],
            "chains": [chain.name for chain in self.chains],
            "capacities": [
                s.assign(chain.num_blocks, chain.name, self.seed, 0).capacities
                for s in _parts(self.strategy)
                for chain in self.chains
            ],
            "initial weights": network["weights"],
        }
        check_agreement(self.transport, mine)


def _parts(strategy: Strategy) -> list[Strategy]:
    return [strategy, *(_parts(strategy.then) if strategy.then is not None else [])]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")
