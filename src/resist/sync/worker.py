"""Worker: one of the S trainers, with its sub-network, optimizer state and average."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resist.errors import UserError
from resist.planning.strategy import Strategy
from resist.subnet.changes import Watch
from resist.subnet.flats import Flats
from resist.subnet.modes import frozen_modules
from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.fragments import Fragment, begin_fragments, write_anchors
from resist.sync.optimizer_state import StateTypes, adopt_state, follow_resize, start_over
from resist.sync.optimizers import check_alone, check_optimizers, optimizers_of


class Worker:
    """One of the S workers, hosted by this process.

    `Job` makes them; see `Job.workers`.

    Args:
        index: The number of the worker, 0 to S - 1.
        subnet: Its sub-network.

    Attributes:
        index: The number of the worker.
        model: Its sub-network as an ordinary `nn.Module`: train it, and make the optimizer from its parameters. Stays
            the same object from round to round.
        subnet: The same network, with its flat tensors.
        state: Optimizer state by name, each in flat tensors laid out as the weights, by dtype of the weights; also that
            of an outer optimizer.
        optimizers: The optimizers that `Job.step` was given for this worker, without wrappers around them.
        anchor: The weights at the beginning of the round, or None if no option needs them in this round. Where workers
            differ in what they have trained since a fragment's mean, what all agree on.
        fragments: What means of changes need; empty if no change is sent in this round.
        apart: Whether this worker may differ from the others in what everyone trains, since fragments were averaged at
            times of their own in the round before.
        average: An average of the weights over time, or None; see `Job.follow`.
        average_anchor: The average at the beginning of the round, or None if no option needs it.
        watches: The state of `subnet` and `average` at the beginning of the round.
        averaged: The user's object that computes `average`.
    """

    def __init__(self, index: int, subnet: Subnet) -> None:
        self.index, self.subnet = index, subnet
        self.model: nn.Module = subnet.model
        self.state: dict[str, Flats] = {}
        self.optimizers: list[Optimizer] = []
        self.anchor: Flats | None = None
        self.fragments: list[Fragment] = []
        self.apart = False
        self.average: Subnet | None = None
        self.average_anchor: Flats | None = None
        self.watches: list[Watch] = []
        self._keep_average = False
        self.averaged: AveragedModel | None = None

    def begin_round(
        self,
        *,
        keep_anchor: bool,
        outer: bool,
        keep_average: bool = False,
        changes: str | None = None,
        fragments: int = 0,
        agreed: bool = True,
    ) -> None:
        """Copy the weights to `anchor` if an option needs them.

        Args:
            keep_anchor: Copy them, with or without an outer optimizer.
            outer: Copy them for an outer optimizer, and create its momentum if there is none yet.
            keep_average: Copy the average too, if there is one.
            changes: Keep the anchor of what the next mean sends as changes: of the "shared" part, or of "all" blocks as
                well. None: nothing is sent as a change.
            fragments: Number of fragments that are averaged at times of their own in this round.
            agreed: All workers have equal weights. Otherwise what they agree on are the anchors of their fragments.
        """
        self._keep_average = keep_average
        self._begin_average()
        flats = self.subnet.flats
        self.anchor = {dtype: flat.clone() for dtype, flat in flats.items()} if keep_anchor or outer else None
        if outer:
            self.state.setdefault(VELOCITY, {dtype: torch.zeros_like(flat) for dtype, flat in flats.items()})
        layout = self.subnet.layouts.get(torch.float32)
        self.apart = not agreed and bool(self.fragments)
        if changes is None or layout is None:
            self.fragments = []
            return
        self.fragments = begin_fragments(
            self.fragments,
            layout,
            (self.anchor or flats)[torch.float32],
            blocks=changes == "all",
            count=fragments,
            agreed=agreed,
            copied=self.anchor is not None,
        )
        if self.anchor is not None and self.apart:
            write_anchors(self.fragments, self.anchor[torch.float32])

    @property
    def agreed(self) -> Flats:
        """The weights that begin the round, as all workers agree on them: a copy where this one differs."""
        flats = self.subnet.flats
        if not self.apart:
            return flats
        agreed = flats[torch.float32].clone()
        write_anchors(self.fragments, agreed)
        return {**flats, torch.float32: agreed}

    def _begin_average(self) -> None:
        flats = None if self.average is None else self.average.flats
        keep = self._keep_average and flats is not None
        self.average_anchor = {dtype: flat.clone() for dtype, flat in flats.items()} if keep and flats else None
        self.watches = [Watch(subnet) for subnet in (self.subnet, self.average) if subnet is not None]

    def note_modes(self) -> None:
        """Note which modules the user keeps in eval mode."""
        self.subnet.frozen_modules = frozen_modules(self.subnet.model, self.subnet.place)
        if self.average is not None:
            self.average.frozen_modules = self.subnet.frozen_modules

    def take_back(self) -> None:
        """Copy tensors that were assigned into the flat tensors; see `Subnet.take_back`.

        Raises:
            UserError: If a parameter was moved out of the flat tensor.
        """
        for subnet in filter(None, (self.subnet, self.average)):
            subnet.take_back()
        self.subnet.check_attached()

    def state_flat(self, name: str, dtype: torch.dtype, own: torch.dtype | None = None) -> Tensor:
        """Return a flat tensor of a state; new ones are zero.

        Args:
            name: Name of the state.
            dtype: Dtype of the weights.
            own: Dtype of the state. Default: that of the weights.

        Returns:
            The tensor, laid out as the weights of `dtype`.
        """
        flats = self.state.setdefault(name, {})
        if dtype not in flats:
            flats[dtype] = torch.zeros_like(self.subnet.flats[dtype], dtype=own or dtype)
        return flats[dtype]

    def collect_state(self, states: Mapping[str, StateTypes], *, reset: bool = False) -> None:
        """Move the optimizers' state into `state` where its layout fits.

        Args:
            states: Names of the states that any worker has, each with its dtype for each dtype of weights.
            reset: Drop what this worker has.
        """
        if reset:
            self.reset_state()
        for name, types in states.items():
            for dtype, own in types.items():
                self.state_flat(name, dtype, own)
        adopt_state(self.subnet, self.optimizers, {name: self.state[name] for name in states})

    def reset_state(self) -> None:
        """Drop the state of all optimizers but the outer one."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
            start_over(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        self.forget_state()

    def forget_state(self) -> None:
        """Drop the flat tensors of all states but the outer momentum."""
        self.state = {name: flats for name, flats in self.state.items() if name == VELOCITY}

    def follow(self, average: AveragedModel) -> None:
        """Exchange an average of the weights with their blocks.

        See `Job.follow`.

        Args:
            average: An average of `model`. Its parameters stay, in new flat tensors.

        Raises:
            UserError: If it is not an average of `model`.
        """
        try:
            self.average, self.averaged = self.subnet.twin(average.module), average
            self._begin_average()
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"{type(average).__name__} holds no copy of the network of worker {self.index}; make it with "
                "torch.optim.swa_utils.AveragedModel(model)"
            ) from error

    def finish_round(self, flats: Mapping[str, Flats], held: Sequence[Sequence[int]]) -> None:
        """Take over the result of a synchronization, for the next plan.

        Args:
            flats: Payload name -> flat tensors, laid out for the next plan.
            held: Blocks of each chain in the next round, in the order of the slots.
        """
        capacities = tuple(len(blocks) for blocks in held)
        self.state = {name: own for name, own in flats.items() if name not in (WEIGHTS, AVERAGE)}
        if capacities != self.subnet.capacities:
            # The flat tensors are new ones. Parameters that remain are the same objects, on other memory.
            before = {id(parameter) for parameter in self.model.parameters()}
            self.subnet.resize(capacities, flats[WEIGHTS])
            follow_resize(self.subnet, self.optimizers, before, self.state)
            if self.average is not None:
                self.average.resize(capacities, flats[AVERAGE])
        for subnet in filter(None, (self.subnet, self.average)):
            subnet.hold(held)

    @torch.no_grad()
    def replace(self, flats: Mapping[str, Flats], held: Sequence[Sequence[int]]) -> None:
        """Take over other values. The state of optimizers has to be dropped before.

        Args:
            flats: WEIGHTS, AVERAGE if there is one, and VELOCITY -> flat tensors, laid out for `held`.
            held: Blocks of each chain, in the order of the slots.
        """
        present = dict(flats)
        if tuple(len(blocks) for blocks in held) == self.subnet.capacities:  # the parameters stay on their memory
            for name, subnet in ((WEIGHTS, self.subnet), (AVERAGE, self.average)):
                if subnet is not None:
                    present[name] = subnet.flats
                    for dtype, flat in subnet.flats.items():
                        flat.copy_(flats[name][dtype])
        self.finish_round(present, held)


def assign_optimizers(
    workers: Sequence[Worker], optimizers: Sequence[Optimizer], strategy: Strategy, num_processes: int
) -> None:
    """Assign optimizers to the hosted workers whose parameters they train.

    Args:
        workers: The hosted workers. They forget the state of their previous optimizers.
        optimizers: The optimizers of all of them, in any order.
        strategy: The strategy, with all its stages.
        num_processes: The number of processes that host the workers.

    Raises:
        UserError: If an optimizer is missing, or does not train the parameters of one hosted worker; if its state
            cannot go with the blocks; if a wrapper joins the workers; if a parameter was moved out of the flat tensor.
    """
    apart = num_processes > 1 and not strategy.every_step
    check_alone(optimizers, [worker.subnet.model for worker in workers] if apart else ())
    for worker in workers:
        worker.subnet.check_attached()
        worker.forget_state()
    grouped = optimizers_of([w.subnet for w in workers], optimizers)
    check_optimizers(optimizers, strategy)
    for worker, assigned in zip(workers, grouped, strict=True):
        worker.optimizers = assigned
