"""What is saved of a job with fragments, and how it goes on."""

from pathlib import Path

import pytest
import torch

from resist.planning.strategy import resist
from resist.runs.job_state import restore_weights
from resist.runs.library import load_checkpoint, save_checkpoint
from wired import STEPS, STRATEGIES, anchors, streamed, tensors_of


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("switch", "int4"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("average", "fp32"), ("diloco", "int8"))),
    ],
)
def test_a_loaded_job_goes_on_bit_for_bit(name: str, wire: str) -> None:
    run, other = streamed(STRATEGIES[name](STEPS), wire), streamed(STRATEGIES[name](STEPS), wire)
    run.train(STEPS)
    for number in range(5):
        state = run.job.state_dict()
        other.job.load_state_dict(state)
        again = other.job.state_dict()
        assert all(torch.equal(value, again["weights"][key]) for key, value in state["weights"].items())
        if number == 1:
            other.train(STEPS + 1)
            other.job.load_state_dict(state)  # in the middle of a round
        for one in (run, other):
            one.train(STEPS)
        assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(other), strict=True))


@pytest.mark.slow
def test_another_job_begins_at_the_anchors() -> None:
    run = streamed(resist(3, STEPS), "int8").train(2 * STEPS)
    state = run.job.state_dict()
    agreed = state["weights"]["stem.weight"]
    assert not torch.equal(agreed, run.job.workers[0].model.get_parameter("stem.weight"))
    for workers, wire, fragments in ((2, "int8", 2), (3, "fp32", 2), (3, "int8", 1), (3, "int8", 0)):
        other = streamed(resist(workers, STEPS), wire, fragments)
        other.job.load_state_dict(state)
        for worker in other.job.workers:
            assert torch.equal(worker.model.get_parameter("stem.weight"), agreed)


def test_a_job_can_be_loaded_while_a_fragment_is_on_its_way() -> None:
    run = streamed(resist(3, STEPS), fragments=1, delay=2).train(STEPS)
    state, expected = run.job.state_dict(), streamed(resist(3, STEPS), fragments=1, delay=2).train(2 * STEPS)
    run.train(2)
    run.job.load_state_dict(state)
    run.train(STEPS)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(expected), strict=True))
    run.train(2)
    run.job.close()


def test_replicas_have_what_all_agree_on(tmp_path: Path) -> None:
    run = streamed(resist(3, STEPS), "int8", replicate=True).train(2 * STEPS)
    (replica,) = run.job.replicas
    state = run.job.state_dict()["weights"]
    assert all(torch.equal(value, replica.tensors[name]) for name, value in state.items())
    other = streamed(resist(3, STEPS), "int8", replicate=True, resume_at=(2, 2 * STEPS))
    restore_weights(other.job, replica.tensors, tmp_path)
    for worker in other.job.workers:
        assert torch.equal(anchors(worker), anchors(run.job.workers[0]))
    other.train(STEPS)
    assert all(torch.equal(anchors(other.job.workers[0]), anchors(worker)) for worker in other.job.workers)


def test_a_run_that_ends_within_a_fragment_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With an average of the weights, which is exchanged at the round's end."""
    run = streamed(resist(3, STEPS), "int8", fragments=1, delay=2).follow().train(STEPS)
    save_checkpoint(tmp_path, run.job)
    run.train(2)  # a fragment is on its way; then the process dies
    other = streamed(resist(3, STEPS), "int8", fragments=1, delay=2).follow()
    load_checkpoint(tmp_path, other.job)
    assert other.job.step_index == STEPS
    for one, more in ((run, STEPS - 2), (other, STEPS)):
        one.train(more)
        full = one.job.full_model(averaged=True)
        assert full is not None
        one.kept = tensors_of(one) + list(full.parameters())
    assert all(torch.equal(*pair) for pair in zip(run.kept, other.kept, strict=True))
