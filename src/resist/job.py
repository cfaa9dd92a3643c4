"""Job: ResIST as a user meets it. The training loop stays the user's; `step` is the only call in it.

    job = Job(build_model, resist(workers=4, local_steps=50))       # draw sub-networks            (Algorithm 1, line 1)
    ... optimizer.step(); job.step(optimizer)                       # l local steps on each        (lines 2 to 4)
                                                                    # average, draw anew, go on    (lines 5 and 6)
    full = job.full_model()                                         # the whole network, scaled
"""

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn

from resist.chains import choose_chains
from resist.comm import Ledger, Transport, check_agreement, connect
from resist.errors import AgreedError, UserError
from resist.exchange import WEIGHTS, Copy, Exchange, assembly
from resist.fold import ANCHOR, OPTIMIZER_STATES, VELOCITY, adopt_state, check_optimizers, follow_resize
from resist.plan import Plan
from resist.strategy import Strategy
from resist.subnet import Subnet, scale_branches, tensors_of, use_batch_statistics

BATCHNORMS = ("recalibrate", "average", "batch")
AVERAGE = "average of weights"


class Worker:
    """One of the S trainers, hosted by this process. `model` is its sub-network, an ordinary `nn.Module`."""

    def __init__(self, index: int, subnet: Subnet) -> None:
        self.index, self.subnet = index, subnet
        self.state: dict[str, Tensor] = {}  # the optimizer's state by kind, laid out as the weights are
        self.model: nn.Module = subnet.model
        self.average: Subnet | None = None  # of its weights over time; see `Job.follow`


class Job:
    """Trains the network that `build_model()` returns, by a strategy, as one of its workers (or several).

    build_model: called once, on the host, with torch's generator seeded by `seed` and restored afterwards. Every
                 process builds the same network and keeps only its own part of it.
    strategy:    see `resist.strategy`.
    chains:      what to partition, as in `("layer3:1-22",)`; default: the longest run of interchangeable blocks.
    batchnorm:   "recalibrate": running statistics are averaged over holders, and `full_model(batches)` estimates them
                 anew on the scaled network; "average": the former only; "batch": none, as in the authors' code: the
                 network uses the statistics of each batch, at test time too.
    scale:       what a chain block's branch is multiplied by in the full network: "inclusion" (mean capacity /
                 num_blocks), "1/S", or a number.
    transport:   default: torch.distributed where this process was started for it, else this process hosts all workers.

    start:       (round, step) at which a job goes on that was interrupted; see `resist.checkpoint`.

    workers: the hosted ones; `model` is the sub-network where there is only one.
    step_index, round: steps done; the round that the next step belongs to.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        strategy: Strategy,
        *,
        chains: Sequence[str] = (),
        seed: int = 0,
        batchnorm: str = "recalibrate",
        scale: str | float = "inclusion",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        transport: Transport | None = None,
        timeout_s: float = 600.0,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise UserError(f"strategy={strategy!r} is not a Strategy; give one, as in resist.resist(workers=4)")
        _one_of("batchnorm", batchnorm, BATCHNORMS)
        for part in _parts(strategy):
            _one_of("optimizer_state", part.optimizer_state, OPTIMIZER_STATES)
        self.strategy, self.seed, self.batchnorm, self.scale = strategy, seed, batchnorm, scale
        self.round, self.step_index = start
        self._steps_in_round = 0
        self._optimizers: tuple[Optimizer, ...] = ()
        full = build_seeded(build_model, seed)
        if batchnorm == "batch":
            use_batch_statistics(full)
        self.chains = choose_chains(full, tuple(chains))
        self.plans = self.plans_of(self.round)
        _ = self.scales  # complains about a wrong scale now rather than at the end
        self.ledger = Ledger(transport if transport is not None else connect(strategy.workers, device, timeout_s))
        if self.ledger.num_workers != strategy.workers:
            raise UserError(
                f"a transport for {self.ledger.num_workers} workers, a strategy for {strategy.workers}; match them"
            )
        self._agree(full, channels_last)
        tensors = tensors_of(full)
        self.workers: list[Worker] = []
        for index in self.ledger.hosted:
            held = [self.plans[chain.name].blocks[index] for chain in self.chains]
            subnet = Subnet(full, self.chains, [len(h) for h in held], device=device, channels_last=channels_last)
            subnet.load(tensors, held)
            self.workers.append(Worker(index, subnet))
        self.mark_anchors()
        if strategy.every_step:
            for worker in self.workers:
                worker.model = self.ledger.average_gradients(worker.subnet.model)

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
        """Calls of `step` until the next synchronisation, that one included."""
        return self.strategy.at(self.round).local_steps - self._steps_in_round

    def plans_of(self, round: int) -> dict[str, Plan]:
        """The plan of each chain in `round`."""
        strategy = self.strategy.at(round)
        return {c.name: strategy.assign(c.num_blocks, c.name, self.seed, round) for c in self.chains}

    def step(self, *optimizers: Optimizer) -> bool:
        """Call it after each optimizer step, with the optimizer of every hosted worker. After `local_steps` calls it
        synchronises: waits for all workers, averages, and puts the next round's blocks into the slots.

        Returns whether it synchronised.
        """
        if len(optimizers) != len(self.workers):
            raise UserError(f"{len(optimizers)} optimizers for {len(self.workers)} hosted workers; pass one for each")
        if optimizers != self._optimizers:
            self._adopt(optimizers)
        self.step_index += 1
        self._steps_in_round += 1
        if self.steps_left > 0:
            return False
        self.synchronise()
        return True

    def _adopt(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Look at the optimizers, once: mistakes are named here, before a round of work is done in vain."""
        for worker in self.workers:
            worker.subnet.check_attached()
            worker.state = {kind: flat for kind, flat in worker.state.items() if kind in (ANCHOR, VELOCITY)}
        check_optimizers([worker.subnet for worker in self.workers], optimizers)
        self._optimizers = optimizers

    def follow(self, *averages: AveragedModel) -> None:
        """Let averages of the weights, as an EMA, go where their blocks go. Without it, an average kept beside a
        sub-network mixes the blocks that lie in a slot one after another. Every process has to call it, before training.

            average = AveragedModel(job.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
            job.follow(average)
            ... optimizer.step(); average.update_parameters(job.model); job.step(optimizer)
            full = job.full_model(batches, averaged=True)

        averages: one for each hosted worker. At a synchronisation they are folded and handed over as the weights are,
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

    def synchronise(self) -> None:
        """End the round now: fold, hand over, go on with the next plan. Every worker has to call it."""
        strategy = self.strategy.at(self.round)
        next_plans = self.plans_of(self.round + 1)
        subnets = {worker.index: worker.subnet for worker in self.workers}
        for subnet in subnets.values():
            subnet.check_attached()
        copies = [Copy(WEIGHTS, {w.index: w.subnet.flat for w in self.workers}, moves=True, averages=True)]
        copies += self._state_copies(strategy.optimizer_state)
        anchors = {worker.index: worker.state[ANCHOR] for worker in self.workers} if strategy.outer else {}
        averages = {w.index: w.average.flat for w in self.workers if w.average is not None}
        if averages:
            copies.append(Copy(AVERAGE, averages, moves=True, averages=True))
        if strategy.outer:
            velocities = {worker.index: worker.state[VELOCITY] for worker in self.workers}
            copies.append(Copy(VELOCITY, velocities, moves=True, averages=False, folds=False))
        if not strategy.every_step:
            Exchange(self.ledger, subnets, copies, self.plans, next_plans, strategy.outer, anchors).finish()
        for number, worker in enumerate(self.workers):
            capacities = [next_plans[chain.name].capacities[worker.index] for chain in self.chains]
            worker.state = {one.name: one.flats[worker.index] for one in copies[1:] if one.name != AVERAGE}
            if tuple(capacities) != worker.subnet.capacities:
                before = {id(parameter) for parameter in worker.model.parameters()}
                worker.subnet.resize(capacities, copies[0].flats[worker.index])
                if self._optimizers:
                    follow_resize(worker.subnet, self._optimizers[number], before, worker.state)
                if worker.average is not None:
                    worker.average.resize(capacities, averages[worker.index])
        self.plans = next_plans
        self.round += 1
        self._steps_in_round = 0
        self.mark_anchors()

    def finish(self) -> None:
        """Fold the last, short round, if steps are open. Nothing that a worker learned is left out."""
        if self._steps_in_round:
            self.synchronise()

    def full_model(
        self, batches: Iterable[object] | None = None, *, on: int = 0, averaged: bool = False
    ) -> nn.Module | None:
        """The complete network, its chain blocks' branches scaled, in eval mode. Every worker has to call it.

        Ends a round that is under way. Only the process that hosts worker `on` assembles it; the others get None.

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
            with torch.no_grad():
                full.shared.copy_(own.shared)
        assembly(self.ledger, subnets, self.plans, full, on).finish()
        if full is None or own is None:
            return None
        scale_branches(full.model, self.chains, self.scales)
        if self.batchnorm == "recalibrate" and _has_running_statistics(full.model):
            recalibrate(full.model, batches, own.device)
        return full.model.eval()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        self.ledger.close()

    def mark_anchors(self) -> None:
        """For an outer optimizer: remember the weights with which this round begins."""
        if self.strategy.at(self.round).outer is None:
            return
        for worker in self.workers:
            worker.state[ANCHOR] = worker.subnet.flat.clone()
            worker.state.setdefault(VELOCITY, torch.zeros_like(worker.subnet.flat))

    def _state_copies(self, policy: str) -> list[Copy]:
        if policy == "reset":
            for optimizer in self._optimizers:
                optimizer.state.clear()
            return []
        for worker, optimizer in zip(self.workers, self._optimizers, strict=False):
            adopt_state(worker.subnet, optimizer, worker.state)
        copies: list[Copy] = []
        for kind in self._kinds():
            flats = {w.index: w.state.setdefault(kind, torch.zeros_like(w.subnet.flat)) for w in self.workers}
            copies.append(Copy(kind, flats, moves=policy in ("travel", "average"), averages=policy == "average"))
        return copies

    def _kinds(self) -> list[str]:
        """The kinds of optimizer state that any worker has. Waits for all processes.

        A worker has none yet where a GradScaler left all its steps out; what moves has to be the same list everywhere.
        """
        kinds = sorted({kind for worker in self.workers for kind in worker.state} - {ANCHOR, VELOCITY})
        mine = json.dumps({"averages": any(worker.average for worker in self.workers), "kinds": kinds})
        told = [json.loads(text) for text in (self.ledger.gather_text(mine) if self.ledger.num_processes > 1 else [mine])]
        if len({one["averages"] for one in told}) > 1:
            raise AgreedError("job.follow was called in some processes and not in others; call it in all of them")
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
        shapes = repr([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors_of(full).items()])
        weights = blake2b(digest_size=8)
        for tensor in tensors_of(full).values():
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        mine = {  # causes before what follows from them: the first difference is the one that is named
            "workers": self.strategy.workers,
            "strategy": [(s.name, s.local_steps, s.optimizer_state, s.at_round) for s in _parts(self.strategy)],
            "seed": self.seed,
            "batchnorm": self.batchnorm,
            "channels_last": channels_last,
            "model": blake2b(shapes.encode(), digest_size=8).hexdigest(),
            "chains": [chain.name for chain in self.chains],
            "capacities": [
                s.assign(chain.num_blocks, chain.name, self.seed, 0).capacities
                for s in _parts(self.strategy)
                for chain in self.chains
            ],
            "initial weights": weights.hexdigest(),
        }
        check_agreement(self.ledger, mine)


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build_model()` with torch's generator of the host seeded, the caller's random state untouched.

    Not `torch.manual_seed`: that seeds the generators of all devices too, and nobody would restore those.
    """
    if isinstance(build_model, nn.Module):  # which can be called as well
        raise UserError(
            f"Job was given a {type(build_model).__name__}; give it the function that builds one, as in "
            "Job(lambda: Net(), ...), so that all processes begin with the same weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_model()
    if not isinstance(model, nn.Module):
        raise UserError(f"build_model() returned a {type(model).__name__}; it has to return the network, an nn.Module")
    return model


def recalibrate(model: nn.Module, batches: Iterable[object] | None, device: torch.device) -> None:
    """Estimate all running BatchNorm statistics of `model` anew, as the mean over `batches`."""
    if batches is None:
        raise UserError(
            "batchnorm='recalibrate' estimates statistics on training batches; call full_model(batches), "
            "or give Job batchnorm='average'"
        )
    update_bn(batches, model, device=device)


def _has_running_statistics(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())


def _parts(strategy: Strategy) -> list[Strategy]:
    return [strategy, *(_parts(strategy.then) if strategy.then is not None else [])]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")
