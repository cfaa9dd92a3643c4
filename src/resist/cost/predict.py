"""The prediction itself: strategies and numbers of workers, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import nn

from resist.cost.footprint import BuildOptimizer, Loss, Network, build_on_meta, mean_square, measure, sgd, sizes_of
from resist.cost.report import Report, Row
from resist.cost.timing import Link, Seconds, Speed, ddp_step_s, exchange_s
from resist.cost.traffic import Sizes, ddp_traffic, mean_traffic, paper_bytes, round_traffic
from resist.errors import UserError
from resist.planning.plan import Plan
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
    """What training `build_model()` would cost, without weights and without training.

    workers:     the numbers of workers to look at.
    strategies:  of "resist", "local_sgd", "diloco", "ddp". diloco's own optimizer keeps its state, so only weights go.
    batch_size, image_shape: images in a worker's step, and their (channels, height, width).
    chains, local_steps, optimizer_state, replicate, batchnorm, min_depth, capacities, seed: as in `Job` and
                 `resist.resist`; capacities are those of one number of workers.
    link, speed: seconds are predicted where both are given; one speed for all workers, or one for each.
    rounds:      how many rounds of real plans the traffic is averaged over.
    build_optimizer, loss: what a step does; loss(model, images) is the scalar that backward begins at.

    Raises UserError for what `Job` would refuse, for values out of bounds, and for a model that does not run on meta.
    """
    counts = {"workers": workers, "batch_size": [batch_size], "image_shape": image_shape, "local_steps": [local_steps],
              "rounds": [rounds]}  # fmt: skip
    for name, values in counts.items():
        if min(values, default=0) < 1:
            raise UserError(f"{name}={','.join(map(str, values))} is too small; give at least 1")
    _check_methods(strategies, optimizer_state, min_depth, capacities)
    speeds = () if speed is None else (speed,) if isinstance(speed, Speed) else tuple(speed)
    _check_one_each("capacities", len(capacities or ()), workers)
    _check_one_each("speeds", len(speeds) if len(speeds) > 1 else 0, workers)
    template = build_on_meta(build_model)
    if batchnorm == "batch":
        use_batch_statistics(template)
    found = choose_chains(template, tuple(chains)) if "resist" in strategies or chains else find_chains(template)[:1]

    def footprint(blocks: tuple[int, ...]) -> Network:
        return measure(
            template, found, blocks,
            batch_size=batch_size, image_shape=image_shape, build_optimizer=build_optimizer, loss=loss,
        )  # fmt: skip

    job = _Prediction(
        sizes_of(template, found),
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
    rows = tuple(job.row(name, number) for number in workers for name in strategies)
    return Report(job.full, rows, batch_size, local_steps, rounds, link, speeds)


@dataclass
class _Prediction:
    """Everything that is the same for all rows of a report."""

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
        """The sub-network with `blocks` blocks in each chain; each is measured once."""
        if blocks not in self.known:
            self.known[blocks] = self.footprint(blocks)
        return self.known[blocks]

    def row(self, name: str, workers: int) -> Row:
        return self._ddp(workers) if name == "ddp" else self._folding(name, workers)

    def _folding(self, name: str, workers: int) -> Row:
        """A strategy that trains apart and folds once a round."""
        plans = self._plans(self._strategy(name, workers))
        run = [
            round_traffic(
                self.sizes, now, then,
                workers=workers, optimizer_state="keep" if name == "diloco" else self.optimizer_state,
                num_states=self.full.num_states, replicate=self.replicate and workers > 1,
            )
            for now, then in pairwise(plans)
        ]  # fmt: skip
        networks = tuple(
            self.network(tuple(plans[0][chain.name].capacities[worker] for chain in self.sizes.chains))
            for worker in range(workers)
        )
        if name == "diloco":
            networks = tuple(_with_outer(network) for network in networks)
        if self.replicate and workers > 1:
            spare = [max(one.replica_bytes.get(worker, 0) for one in run) for worker in range(workers)]
            networks = tuple(_with_replicas(n, more, name) for n, more in zip(networks, spare, strict=True))
        seconds = None
        if self.link is not None and self.speeds:
            compute = self.local_steps * max(self._step_s(w, network) for w, network in enumerate(networks))
            exchange = sum(exchange_s(one, self.link, workers) for one in run) / len(run)
            seconds = self._seconds(workers, compute, exchange, 0.0)
        traffic = mean_traffic(run, workers, paper_bytes(self.sizes, plans[0], workers))
        return Row(name, workers, networks, traffic, seconds)

    def _ddp(self, workers: int) -> Row:
        """torch's DistributedDataParallel: an exchange in every step, beneath backward where there is time."""
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

    def _plans(self, strategy: Strategy) -> list[Mapping[str, Plan]]:
        chains = self.sizes.chains
        return [
            {chain.name: strategy.assign(chain.num_blocks, chain.name, self.seed, number) for chain in chains}
            for number in range(self.rounds + 1)
        ]

    def _step_s(self, worker: int, network: Network) -> float:
        speed = self.speeds[worker % len(self.speeds)]
        return speed.step_s(self.batch_size, network.training_flops / self.full.training_flops)

    def _seconds(self, workers: int, compute: float, exchange: float, hidden: float) -> Seconds:
        images = workers * self.batch_size * self.local_steps
        return Seconds(compute, exchange, hidden, images / (compute + exchange))


def _with_outer(network: Network) -> Network:
    """With the two copies of the weights that an outer optimizer keeps."""
    memory, more = network.memory, 2 * network.memory.weights
    return replace(network, memory=replace(memory, outer=more, peak=memory.peak + more))


def _with_replicas(network: Network, spare_bytes: int, name: str) -> Network:
    """With replicas: the round's first weights (which an outer optimizer keeps anyway) and replicas of blocks."""
    memory = network.memory
    more = spare_bytes + (0 if name == "diloco" else memory.weights)
    return replace(network, memory=replace(memory, replicas=more, peak=memory.peak + more))


def _check_methods(
    strategies: Sequence[str], optimizer_state: str, min_depth: int | None, capacities: Sequence[int] | None
) -> None:
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}")
    if not strategies:
        raise UserError(f"no strategy to look at; name some of {', '.join(STRATEGIES)}")
    if optimizer_state not in OPTIMIZER_STATES:
        raise UserError(f"optimizer_state={optimizer_state!r} is not one of {', '.join(OPTIMIZER_STATES)}")
    for option, value in (("min_depth", min_depth), ("capacities", capacities)):
        if value is not None and "resist" not in strategies:
            raise UserError(f"{option} says something to strategy resist only; add it, or leave {option} out")


def _check_one_each(what: str, num: int, workers: Sequence[int]) -> None:
    """`num` capacities or speeds (0: none were given) fit one number of workers."""
    if num and set(workers) != {num}:
        raise UserError(f"{num} {what} for {' or '.join(map(str, workers))} workers; give one for each worker")
