"""NaN and inf are found in every dtype, and the host waits for few values."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resist.sync.averaging import all_finite
from waits import VALUES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_single_bad_number_is_found(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (0, 1, 1000)]
    assert all_finite(*tensors)
    assert all_finite()
    for number in (1, 2):
        spoiled = [tensor.clone() for tensor in tensors]
        spoiled[number][-1] = torch.tensor(bad).to(dtype)
        assert not all_finite(*spoiled)


def test_the_largest_numbers_are_finite_and_integers_too() -> None:
    largest = [torch.tensor([torch.finfo(d).max, torch.finfo(d).min], dtype=d) for d in DTYPES if not d.is_complex]
    assert all_finite(*largest, torch.tensor([2**63 - 1, -(2**63)]))


class Reads(TorchDispatchMode):
    """Counts the values that the host reads."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket in VALUES
        return func(*args, **(kwargs or {}))


def test_the_host_reads_one_value_for_each_dtype() -> None:
    parts = [torch.randn(10).to(dtype) for dtype in (torch.float32, torch.bfloat16) * 5]
    with Reads() as reads:
        assert all_finite(*parts)
    assert reads.number == 2
