"""Prediction: one row for each strategy and number of workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import nn

from resist.cost.footprint import BuildOptimizer, Loss, Network, build_on_meta, mean_square, measure, sgd, sizes_of
from resist.cost.report import Report, Row
from resist.cost.timing import Link, Seconds, Speed, ddp_step_s, exchange_s
from resist.cost.traffic import Sizes, ddp_traffic, mean_traffic, paper_bytes, round_traffic
from resist.errors import UserError
from resist.planning.strategy import Strategy, local_sgd, resist
from resist.subnet.batchnorm import use_batch_statistics
from resist.subnet.chains import choose_chains, find_chains
from resist.sync.optimizer_state import OPTIMIZER_STATES

STRATEGIES = ("resist", "local_sgd", "diloco", "ddp")


def predict(
    build_model: Callable[[], nn.Module],
    *,
    workers: Sequence[int] = (2, 4, 8),
    strategies: Sequence[str] = STRATEGIES,
    chains: Sequence[str] = (),
    batch_size: int = 128,
    image_shape: Sequence[int] = (3, 32, 32),
    local_steps: int = 50,
    optimizer_state: str = "travel",
    replicate: bool = False,
    batchnorm: str = "recalibrate",
    min_depth: int | None = None,
    capacities: Sequence[int] | None = None,
    link: Link | None = None,
    speed: Speed | Sequence[Speed] | None = None,
    rounds: int = 50,
    seed: int = 0,
    build_optimizer: BuildOptimizer = sgd,
    loss: Loss = mean_square,
) -> Report:
    """Predict the cost of training `build_model()`, without weights and without training.

    Args:
        build_model: Builds the full network.
        workers: Numbers of workers to predict.
        strategies: Some of `STRATEGIES`. The workers' optimizers keep their state with "diloco", so that only weights
            are sent.
        chains: Names of the chains, as in `Job`.
        batch_size: Images in a worker's step.
        image_shape: (channels, height, width) of an image.
        local_steps: Optimizer steps in a round.
        optimizer_state: As in `Job`.
        replicate: As in `Job`.
        batchnorm: As in `Job`.
        min_depth: As in `resist.resist`.
        capacities: As in `resist.resist`, for one number of workers.
        link: Connection of each worker. Seconds are predicted if `link` and `speed` are given.
        speed: Speed of the devices, one for all workers or one for each.
        rounds: Number of rounds over whose plans the traffic is averaged.
        seed: Seed of the plans.
        build_optimizer: Makes the optimizer from the parameters.
        loss: `loss(model, images)` returns the scalar from which backward starts.

    Raises:
        UserError: `Job` would refuse an argument, a value is out of bounds, or the model does not run on the meta
            device.
    """
    counts = {
        "workers": workers,
        "batch_size": [batch_size],
        "image_shape": image_shape,
        "local_steps": [local_steps],
        "rounds": [rounds],
    }
    for name, values in counts.items():
        if min(values, default=0) < 1:
            raise UserError(f"{name}={','.join(map(str, values))}; must be at least 1")
    _check_methods(strategies, optimizer_state, min_depth, capacities)
    speeds = () if speed is None else (speed,) if isinstance(speed, Speed) else tuple(speed)
    _check_one_each("capacities", len(capacities or ()), workers)
    _check_one_each("speeds", len(speeds) if len(speeds) > 1 else 0, workers)
    template = build_on_meta(build_model)
    if batchnorm == "batch":
        use_batch_statistics(template)
    # Strategies that train the full network need no chain.
    chosen = choose_chains(template, tuple(chains)) if "resist" in strategies or chains else find_chains(template)[:1]

    def footprint(blocks: tuple[int, ...]) -> Network:
        return measure(
            template,
            chosen,
            blocks,
            batch_size=batch_size,
            image_shape=image_shape,
            build_optimizer=build_optimizer,
            loss=loss,
        )

    prediction = _Prediction(
        sizes_of(template, chosen),
        footprint,
        local_steps,
        optimizer_state,
        replicate,
        min_depth,
        capacities,
        rounds,
        seed,
        batch_size,
        link,
        speeds,
    )
    rows = tuple(prediction.row(name, number) for number in workers for name in strategies)
    return Report(prediction.full, rows, batch_size, local_steps, rounds, link, speeds)


@dataclass
class _Prediction:
    """Arguments that all rows of a report share; `known` keeps the footprints that were measured."""

    sizes: Sizes
    footprint: Callable[[tuple[int, ...]], Network]
    local_steps: int
    optimizer_state: str
    replicate: bool
    min_depth: int | None
    capacities: Sequence[int] | None
    rounds: int
    seed: int
    batch_size: int
    link: Link | None
    speeds: tuple[Speed, ...]
    known: dict[tuple[int, ...], Network] = field(default_factory=dict)

    @property
    def full(self) -> Network:
        return self.network(tuple(chain.num_blocks for chain in self.sizes.chains))

    def network(self, blocks: tuple[int, ...]) -> Network:
        """Footprint of the sub-network with `blocks` blocks in each chain, measured once."""
        if blocks not in self.known:
            self.known[blocks] = self.footprint(blocks)
        return self.known[blocks]

    def row(self, name: str, workers: int) -> Row:
        return self._ddp(workers) if name == "ddp" else self._averaging(name, workers)

    def _averaging(self, name: str, workers: int) -> Row:
        """Row of a strategy that averages weights once in a round."""
        strategy = self._strategy(name, workers)
        plans = [strategy.plan(self.sizes.chains, seed=self.seed, round=round) for round in range(self.rounds + 1)]
        run = [
            round_traffic(
                self.sizes,
                plan,
                next_plan,
                workers=workers,
                optimizer_state="keep" if name == "diloco" else self.optimizer_state,
                num_states=self.full.num_states,
                replicate=self.replicate and workers > 1,
            )
            for plan, next_plan in pairwise(plans)
        ]
        networks = tuple(self.network(plans[0].capacities(worker)) for worker in range(workers))
        if name == "diloco":
            networks = tuple(_with_outer(network) for network in networks)
        if self.replicate and workers > 1:
            replica_bytes = [max(traffic.replica_bytes.get(w, 0) for traffic in run) for w in range(workers)]
            networks = tuple(_with_replicas(n, size, name) for n, size in zip(networks, replica_bytes, strict=True))
        seconds = None
        if self.link is not None and self.speeds:
            compute = self.local_steps * max(self._step_s(w, network) for w, network in enumerate(networks))
            exchange = sum(exchange_s(traffic, self.link, workers) for traffic in run) / len(run)
            seconds = self._seconds(workers, compute, exchange, 0.0)
        traffic = mean_traffic(run, workers, paper_bytes(self.sizes, plans[0], workers=workers))
        return Row(name, workers, networks, traffic, seconds)

    def _ddp(self, workers: int) -> Row:
        """Row of torch's DistributedDataParallel: an exchange in every step, overlapped with backward."""
        traffic = ddp_traffic(self.sizes, workers=workers, local_steps=self.local_steps)
        whole = self.sizes.whole()
        buckets = whole.trainable * self.sizes.itemsize
        memory = replace(self.full.memory, buckets=buckets, peak=self.full.memory.peak + buckets)
        seconds = None
        if self.link is not None and self.speeds:
            step_s = max(self._step_s(worker, self.full) for worker in range(workers))
            share = self.full.forward_flops / self.full.training_flops
            exposed, hidden = ddp_step_s(traffic, self.link, workers, self.local_steps, step_s, share)
            seconds = self._seconds(
                workers, self.local_steps * step_s, self.local_steps * exposed, self.local_steps * hidden
            )
        paper = self.local_steps * 2 * workers * whole.parameters * self.sizes.itemsize
        networks = (replace(self.full, memory=memory),) * workers
        return Row("ddp", workers, networks, mean_traffic([traffic], workers, paper), seconds)

    def _strategy(self, name: str, workers: int) -> Strategy:
        if name in ("local_sgd", "diloco"):
            return local_sgd(workers, self.local_steps)
        return resist(workers, self.local_steps, min_depth=self.min_depth, capacities=self.capacities)

    def _step_s(self, worker: int, network: Network) -> float:
        speed = self.speeds[worker % len(self.speeds)]
        return speed.step_s(self.batch_size, network.training_flops / self.full.training_flops)

    def _seconds(self, workers: int, compute: float, exchange: float, hidden: float) -> Seconds:
        images = workers * self.batch_size * self.local_steps
        return Seconds(compute, exchange, hidden, images / (compute + exchange))


def _with_outer(network: Network) -> Network:
    """The network with the memory of an outer optimizer: two tensors of the size of the weights."""
    memory, outer = network.memory, 2 * network.memory.weights
    return replace(network, memory=replace(memory, outer=outer, peak=memory.peak + outer))


def _with_replicas(network: Network, replica_bytes: int, name: str) -> Network:
    """The network with replicas of blocks and the round's first weights (which an outer optimizer keeps anyway)."""
    memory = network.memory
    replicas = replica_bytes + (0 if name == "diloco" else memory.weights)
    return replace(network, memory=replace(memory, replicas=replicas, peak=memory.peak + replicas))


def _check_methods(
    strategies: Sequence[str], optimizer_state: str, min_depth: int | None, capacities: Sequence[int] | None
) -> None:
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}")
    if not strategies:
        raise UserError(f"no strategy given; give some of {', '.join(STRATEGIES)}")
    if optimizer_state not in OPTIMIZER_STATES:
        raise UserError(f"optimizer_state={optimizer_state!r} is not one of {', '.join(OPTIMIZER_STATES)}")
    for option, value in (("min_depth", min_depth), ("capacities", capacities)):
        if value is not None and "resist" not in strategies:
            raise UserError(f"{option} has no effect without strategy resist; add resist, or remove {option}")


def _check_one_each(noun: str, num: int, workers: Sequence[int]) -> None:
    """Raise UserError if `num` capacities or speeds (0: none were given) are not one for each worker."""
    if num and set(workers) != {num}:
        raise UserError(f"{num} {noun} for {' or '.join(map(str, workers))} workers; give one for each worker")
