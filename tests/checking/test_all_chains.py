"""All chains with an example: those that break a law are left out, with the reason."""

import logging

import pytest
import torch
from torch import Tensor, nn

from resist.checking.validate import choose_checked
from resist.errors import UserError

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Other(Block):
    pass


class Net(nn.Module):
    """Two chains; a layer of the last block of the first one is used again, so that it cannot be left out."""

    def __init__(self, *, right: bool = True) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(6))
        self.second = nn.ModuleList(
            (Other if right else nn.Linear)(*(() if right else (WIDTH, WIDTH))) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        return self.first[-1].linear(x)  # type: ignore[operator,union-attr]


BATCH = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
REASON = r"a sub-network with blocks 0 2 4 of first:0-5 does not compute the same as the network without the others"


def test_a_chain_that_breaks_a_law_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="resist"):
        chains = choose_checked(Net(), ("all",), BATCH)
    assert [chain.name for chain in chains] == ["second:0-3"]
    (line,) = caplog.messages
    assert line.startswith(f"chain first:0-5 is left undivided: {REASON}")


def test_a_named_chain_is_refused() -> None:
    with pytest.raises(UserError, match=REASON):
        choose_checked(Net(), ("first", "second"), BATCH)
    with pytest.raises(UserError, match=REASON):
        choose_checked(Net(right=False), ("all",), BATCH)


@pytest.mark.parametrize("names", [("all", "second"), ("second", "all"), ("all", "all")])
def test_all_stands_alone(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"`chains=all` takes all chains that there are; give it alone, or name the"):
        choose_checked(Net(), names, BATCH)
