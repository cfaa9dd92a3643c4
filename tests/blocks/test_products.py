"""Tests of `resist.blocks.products`: equal products are computed once, and never those of other numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resist.blocks.products import Products


class Counting(TorchDispatchMode):
    """Counts the products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computed += "addmm" in str(func) or "convolution" in str(func)
        return func(*args, **(kwargs or {}))


class Through(TorchDispatchMode):
    """Sends all operations to `Products`."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.products.compute(func, args, kwargs or {})


@pytest.fixture
def net() -> nn.Linear:
    return nn.Linear(8, 8)


@pytest.fixture
def products() -> Products:
    return Products()


def run(products: Products, model: nn.Module, body: Callable[[], Any]) -> tuple[Any, int]:
    products.begin(model)
    with Counting() as counting, torch.no_grad(), Through(products):
        return body(), counting.computed


def test_an_equal_product_of_a_later_run_is_not_computed(products: Products, net: nn.Linear) -> None:
    x = torch.randn(3, 8)
    first, computed = run(products, net, lambda: net(x))
    again, computed_again = run(products, net, lambda: net(x.clone()))
    assert (computed, computed_again) == (1, 0)
    assert torch.equal(first, again)


def test_convolutions_in_another_memory_format_are_computed(products: Products) -> None:
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 6, 6)
    assert run(products, conv, lambda: conv(x))[1] == 1
    assert run(products, conv, lambda: conv(x))[1] == 0
    assert run(products, conv, lambda: conv(x.contiguous(memory_format=torch.channels_last)))[1] == 1


@pytest.mark.parametrize("place", ["input", "weight", "weight by data", "weight in the run", "other data"])
def test_products_of_other_numbers_are_computed(products: Products, net: nn.Linear, place: str) -> None:
    x = torch.randn(3, 8)
    run(products, net, lambda: net(x))

    def body() -> Tensor:
        if place == "weight in the run":
            net.weight.data.mul_(2.0)
        return net(x)

    with torch.no_grad():
        if place == "input":
            x[0, 0] += 1e-6
        elif place == "weight":
            net.weight[0, 0] += 1.0
        elif place == "weight by data":
            net.weight.data[0, 0] += 1.0
            products.forget_weights()
        elif place == "other data":
            net.weight.data = net.weight.data + 1.0
    found, computed = run(products, net, body)
    assert computed == 1
    assert torch.equal(found, nn.functional.linear(x, net.weight, net.bias))


def test_what_is_written_into_a_result_does_not_come_back(products: Products, net: nn.Linear) -> None:
    x = torch.randn(3, 8)
    expected = net(x).detach().clone()

    def body() -> tuple[Tensor, Tensor]:
        first, second = net(x), net(x)  # equal ones in one run
        first.zero_()
        return second, net(x)

    for _ in range(2):
        for found in run(products, net, body)[0]:
            torch.testing.assert_close(found, expected)
    # Through a view without a version of its own, too.
    run(products, net, lambda: net(x).data[0].fill_(7.0))
    torch.testing.assert_close(run(products, net, lambda: net(x))[0], expected)


def test_results_of_a_scope_are_dropped_at_its_end(products: Products, net: nn.Linear) -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    run(products, net, lambda: net(x))
    with products.scope():
        assert run(products, net, lambda: net(y))[1] == 1
        assert run(products, net, lambda: net(y))[1] == 0
    assert run(products, net, lambda: net(y))[1] == 1
    assert run(products, net, lambda: net(x))[1] == 0
    products.clear()
    assert run(products, net, lambda: net(x))[1] == 1


def test_no_more_results_are_kept_than_there_is_room_for(
    products: Products, net: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resist.blocks.products.MOST_BYTES", 3 * 8 * 4)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert run(products, net, lambda: (net(x), net(y)))[1] == 2
    assert run(products, net, lambda: (net(x), net(y)))[1] == 1
