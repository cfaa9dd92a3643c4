"""Prediction: one row for each strategy and number of workers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

from torch import nn

from resist.blocks.chain import Chain
from resist.blocks.chains import find_chains
from resist.cost.evaluation import forward_pass
from resist.cost.footprint import Loss, Network, build_on_meta, choose, mean_square, measure, sgd
from resist.cost.gpu import GpuMemory, GpuSettings, built_on_gpu, gpu_memory
from resist.cost.links import Link, Links
from resist.cost.options import change_bytes, with_average, with_changes, with_outer, with_replicas
from resist.cost.report import Report, Row
from resist.cost.sizes import Sizes, StateSizes, sizes_of
from resist.cost.states import BuildOptimizer, StateMeter
from resist.cost.timing import Seconds, Speed, ddp_step_s, exchange_s, fragments_s
from resist.cost.traffic import RoundTraffic, ddp_traffic, mean_traffic, paper_bytes, round_traffic
from resist.errors import UserError
from resist.planning.assign import PartitionBlocks
from resist.planning.capacities import Capacities
from resist.planning.plan import RoundPlan
from resist.planning.strategy import Strategy
from resist.planning.wire import FP32, Wire, as_wire
from resist.subnet.batchnorm import use_batch_statistics
from resist.sync.options import check_options


def predict(
    build_model: Callable[[], nn.Module],
    strategies: Sequence[Strategy],
    *,
    chains: str | Sequence[str] = (),
    example: object = None,
    batch_size: int = 128,
    image_shape: Sequence[int] = (3, 32, 32),
    replicate: bool = False,
    average: bool = False,
    wire: str | Wire = FP32,
    batchnorm: str = "recalibrate",
    link: Link | Links | None = None,
    speed: Speed | Sequence[Speed] | None = None,
    rounds: int = 50,
    seed: int = 0,
    build_optimizer: BuildOptimizer = sgd,
    loss: Loss = mean_square,
    gpu: GpuSettings | None = None,
) -> Report:
    """Predict the cost of training `build_model()`, without weights and without training.

    Args:
        build_model: Builds the full network.
        strategies: The strategies to compare, with the same number of local steps, and without switches. Two of the
            same name have different numbers of workers. Capacities may change by round.
        chains: Names of the chains, as in `Job`.
        example: One batch, as in `Job`, which finds the chains that a `Job` with it partitions. It needs the weights
            of the network. Default: blocks are tried with guesses.
        batch_size: Images in a worker's step.
        image_shape: (channels, height, width) of an image.
        replicate: As in `Job`.
        average: Count an average of the weights (EMA) that each worker keeps, see `Job.follow`.
        wire: Formats of what is sent, as in `Job`, but of strategies that average gradients in every step.
        batchnorm: As in `Job`.
        link: Connection of each worker, or the connections of all. Seconds are predicted if `link` and `speed` are
            given.
        speed: Speed of the devices, one for all workers or one for each.
        rounds: Number of rounds over whose plans the traffic is averaged.
        seed: Seed of the plans.
        build_optimizer: Makes the optimizer from the parameters.
        loss: `loss(model, images)` returns the scalar from which backward starts.
        gpu: Settings of a run on GPUs, whose memory is predicted then. Default: the device is the CPU.

    Returns:
        A report with one row for each strategy, and for each change of its capacities: a round as it then is, without
        the growth itself.

    Raises:
        UserError: An argument has an invalid type or value, a strategy does not fit the others or the model's chains,
            the number of speeds or links is wrong, or the model does not run on the meta device.
    """
    formats = as_wire(wire)
    speeds = () if speed is None else (speed,) if isinstance(speed, Speed) else tuple(speed)
    links = Links((link,)) if isinstance(link, Link) else link
    _check_numbers(batch_size=[batch_size], image_shape=image_shape, rounds=[rounds])
    _check_strategies(strategies, batchnorm, formats)
    _check_each(strategies, speeds=len(speeds), links=0 if links is None else len(links.each))
    template = build_on_meta(build_model)
    if batchnorm == "batch":
        use_batch_statistics(template)
    # Strategies that train the full network need no chain.
    needs_chain = bool(chains) or any(strategy.ever_partitions for strategy in strategies)
    chosen = choose(build_model, template, chains, example) if needs_chain else find_chains(template)[:1]
    measured = partial(
        measure,
        template,
        chosen,
        batch_size=batch_size,
        image_shape=image_shape,
        build_optimizer=build_optimizer if gpu is None else built_on_gpu(build_optimizer),
        loss=loss,
    )
    network = cache(lambda blocks: with_average(measured(blocks)) if average else measured(blocks))
    full = network(tuple(chain.num_blocks for chain in chosen))
    prediction = _Prediction(
        sizes=sizes_of(template, chosen),
        network=network,
        state=partial(StateMeter(build_optimizer).sizes, template, chosen),
        full=full,
        batch_size=batch_size,
        replicate=replicate,
        average=average,
        wire=formats,
        rounds=rounds,
        seed=seed,
        links=links,
        speeds=speeds,
        gpu=gpu,
        test_bytes=0 if gpu is None else _test_bytes(template, chosen, full, gpu, image_shape),
    )
    rows = tuple(row for strategy in strategies for row in prediction.rows_of(strategy))
    return Report(full, rows, batch_size, strategies[0].local_steps, rounds, links, speeds)


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    """Values that all rows of a report share.

    `network` measures each sub-network once, by its blocks in each chain; `state` the optimizer's state, by the blocks
    of each worker.
    """

    sizes: Sizes
    network: Callable[[tuple[int, ...]], Network]
    state: Callable[[Sequence[Sequence[int]]], StateSizes]
    full: Network
    batch_size: int
    replicate: bool
    average: bool
    wire: Wire
    rounds: int
    seed: int
    links: Links | None
    speeds: tuple[Speed, ...]
    gpu: GpuSettings | None
    test_bytes: int

    def rows_of(self, strategy: Strategy) -> list[Row]:
        if strategy.every_step:
            return [self._every_step(strategy)]
        if strategy.capacities is not None:
            strategy.capacities.check(strategy.workers, self.sizes.chains)
        return [self._every_round(strategy, first) for first in strategy.change_rounds]

    def _plans(self, strategy: Strategy, first: int) -> list[RoundPlan]:
        """Plans of one round more than `rounds`, from round `first` on, with the capacities of this one."""
        chains, assign = self.sizes.chains, strategy.assign
        if isinstance(assign, PartitionBlocks):
            plans = strategy.plan(chains, seed=self.seed, round=first).plans
            held = {chain.name: plan.capacities for chain, plan in zip(chains, plans, strict=True)}
            strategy = replace(strategy, assign=replace(assign, capacities=Capacities(by_chain=held)))
        rounds = range(first, first + self.rounds + 1)
        return [strategy.plan(chains, seed=self.seed, round=round) for round in rounds]

    def _every_round(self, strategy: Strategy, first: int) -> Row:
        """Row of a strategy that averages weights once in a round, for the rounds from `first` on."""
        workers, plans = strategy.workers, self._plans(strategy, first)
        name = strategy.name if len(strategy.change_rounds) == 1 else f"{strategy.name} after {first} rounds"
        replicate = self.replicate and workers > 1
        capacities = [plans[0].capacities(worker) for worker in range(workers)]
        state = self.state(capacities)
        run = [
            round_traffic(
                self.sizes,
                plan,
                next_plan,
                strategy=strategy,
                state=state,
                average=self.average,
                replicate=replicate,
                wire=self.wire,
            )
            for plan, next_plan in pairwise(plans)
        ]
        networks = [self._with_options(strategy, plans[0], run, worker, replicate) for worker in range(workers)]
        seconds = None
        if self.links is not None and self.speeds:
            seconds = self._round_seconds(strategy, run, networks, self.links)
        traffic = mean_traffic(run, workers, paper_bytes(self.sizes, plans[0], workers=workers))
        return Row(name, workers, tuple(networks), traffic, seconds, self._gpu(networks))

    def _with_options(
        self, strategy: Strategy, plan: RoundPlan, run: Sequence[RoundTraffic], worker: int, replicate: bool
    ) -> Network:
        """The sub-network of a worker, with the memory that the options need."""
        network = self.network(plan.capacities(worker))
        if strategy.outer is not None:
            network = with_outer(network)
        if strategy.workers > 1:
            part = self.sizes.whole() if plan.held_by_all else self.sizes.shared
            anchored = not plan.held_by_all and (strategy.outer is not None or replicate)
            network = with_changes(network, change_bytes(part, self.wire, strategy.workers, anchored=anchored))
        return with_replicas(network, run, worker) if replicate else network

    def _round_seconds(
        self, strategy: Strategy, run: Sequence[RoundTraffic], networks: Sequence[Network], links: Links
    ) -> Seconds:
        """Seconds of a mean round, of whose exchange the steps hide a part of the fragments."""
        step_s = max(self._step_s(worker, network) for worker, network in enumerate(networks))
        times = self.wire.times(strategy.local_steps)
        end = sum(exchange_s(traffic, links, strategy.workers) for traffic in run)
        own = [fragments_s(traffic, links, strategy.workers, times, step_s) for traffic in run]
        waited, hidden = map(sum, zip(*own, strict=True))
        compute = strategy.local_steps * step_s
        return self._seconds(strategy, compute, (end + waited) / len(run), hidden / len(run))

    def _every_step(self, strategy: Strategy) -> Row:
        """Row of torch's DistributedDataParallel: an exchange in every step, overlapped with backward."""
        workers, local_steps = strategy.workers, strategy.local_steps
        traffic = ddp_traffic(self.sizes, workers=workers, local_steps=local_steps)
        whole = self.sizes.whole()
        buckets = whole.trainable
        memory = replace(self.full.memory, buckets=buckets, peak=self.full.memory.peak + buckets)
        seconds = None
        if self.links is not None and self.speeds:
            step_s = max(self._step_s(worker, self.full) for worker in range(workers))
            share = self.full.forward_flops / self.full.training_flops
            exposed, hidden = ddp_step_s(traffic, self.links, workers, local_steps, step_s, share)
            seconds = self._seconds(strategy, local_steps * step_s, local_steps * exposed, local_steps * hidden)
        paper = local_steps * 2 * workers * whole.parameters
        networks = (replace(self.full, memory=memory),) * workers
        mean = mean_traffic([traffic], workers, paper)
        return Row(strategy.name, workers, networks, mean, seconds, self._gpu(networks, every_step=True))

    def _gpu(self, networks: Sequence[Network], *, every_step: bool = False) -> GpuMemory | None:
        """Memory of the GPU that needs most; DistributedDataParallel has one process for each worker."""
        if self.gpu is None:
            return None
        settings = replace(self.gpu, processes=None) if every_step else self.gpu
        return gpu_memory([network.memory for network in networks], settings, test=self.test_bytes)

    def _step_s(self, worker: int, network: Network) -> float:
        speed = self.speeds[worker % len(self.speeds)]
        return speed.step_s(self.batch_size, network.training_flops / self.full.training_flops)

    def _seconds(self, strategy: Strategy, compute: float, exchange: float, hidden: float) -> Seconds:
        images = strategy.workers * self.batch_size * strategy.local_steps
        return Seconds(compute, exchange, hidden, images / (compute + exchange))


def _test_bytes(
    template: nn.Module, chains: Sequence[Chain], full: Network, gpu: GpuSettings, image_shape: Sequence[int]
) -> int:
    """Memory of a test of the full network on a GPU, where it is assembled, and then copied."""
    forward = forward_pass(template, chains, full.blocks, gpu.test_batch, image_shape)
    return 2 * full.memory.weights + (full.memory.weights if forward is None else forward.peak_bytes)


def _check_numbers(**given: Sequence[int]) -> None:
    for name, values in given.items():
        if min(values, default=0) < 1:
            raise UserError(f"`{name}={','.join(map(str, values))}`; must be at least 1")


def _check_strategies(strategies: Sequence[Strategy], batchnorm: str, wire: Wire) -> None:
    if not strategies:
        raise UserError("no strategy given; give at least one, as in resist.resist(workers=4)")
    for strategy in strategies:
        check_options(strategy, batchnorm=batchnorm, on_nonfinite="stop", replicate=False)
        if strategy.then is not None:
            raise UserError(f"the strategy switches at round {strategy.at_round}; give its parts as two strategies")
    # Rows are identified, and compared, by name and number of workers.
    for (name, workers), count in Counter((strategy.name, strategy.workers) for strategy in strategies).items():
        if count > 1:
            raise UserError(f"strategy {name} with {workers} workers is given {count} times; give it once")
    lengths = {strategy.local_steps for strategy in strategies}
    if len(lengths) > 1:
        text = " and ".join(map(str, sorted(lengths)))
        raise UserError(f"strategies with {text} local steps; give all of them the same number, to compare rounds")
    for strategy in strategies:
        if not strategy.every_step:
            wire.times(strategy.local_steps)  # the round is long enough for all fragments


def _check_each(strategies: Sequence[Strategy], **given: int) -> None:
    """Raise UserError where there are several speeds or links, but not one for each worker."""
    numbers = {strategy.workers for strategy in strategies}
    for what, count in given.items():
        if count > 1 and numbers != {count}:
            text = " or ".join(map(str, sorted(numbers)))
            raise UserError(f"{count} {what} for {text} workers; give one for each worker")
