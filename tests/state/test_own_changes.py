"""Errors of wire formats in a checkpoint: what this version writes, and what earlier ones wrote."""

import pytest
import torch
from torch import Tensor

from resist.errors import UserError
from resist.planning.strategy import resist
from resist.state.own_changes import load_own, own_record
from wired import Run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_come_back_from_both_dtypes(dtype: torch.dtype) -> None:
    run = Run(resist(3, 1), "int4").train(2)
    worker, tensors = run.job.workers[0], dict[str, Tensor]()
    record = own_record(worker, run.job.wire, tensors, ("own",))
    feedback = worker.fragments[0].feedback
    before = [value.clone() for value in (feedback.error, feedback.piece_error) if value is not None]
    assert len(before) == 2
    assert all(value.any() for value in before)
    saved = {key: tensor.to(dtype, copy=True) for key, tensor in tensors.items()}
    run.train(1)
    load_own(worker, run.job.wire, record, saved, "here")()
    after = [worker.fragments[0].feedback.error, worker.fragments[0].feedback.piece_error]
    for old, new in zip(before, after, strict=True):
        assert new is not None
        assert new.dtype == torch.bfloat16
        assert torch.equal(old, new)


def test_errors_of_another_dtype_are_damaged() -> None:
    run = Run(resist(3, 1), "int4").train(2)
    worker, tensors = run.job.workers[0], dict[str, Tensor]()
    record = own_record(worker, run.job.wire, tensors, ("own",))
    saved = {key: tensor.half() for key, tensor in tensors.items()}
    with pytest.raises(UserError, match=r"^here is damaged: error has torch\.float16 of 1 dimensions$"):
        load_own(worker, run.job.wire, record, saved, "here")
