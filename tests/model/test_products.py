"""Single matrix products, watched and changed. tests/model/test_trace.py has the interruptions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from factsmith.core.errors import UnsupportedModelError
from factsmith.model.products import products, replacing_factors


def test_products_watch_a_bare_parameter() -> None:
    weight, x = nn.Parameter(torch.randn(3, 4, 5)), torch.randn(2, 4)
    with torch.no_grad(), products({"w": weight}) as seen:
        y = x @ weight[1]
    assert len(seen) == 1 and seen[0].name == "w"
    torch.testing.assert_close(seen[0].left @ seen[0].right, y)
    with torch.no_grad(), products({"w": weight}, {"w": lambda out: out * 2}):
        torch.testing.assert_close(x @ weight[1], 2 * y)


class Bank(nn.Module):
    """Two experts in one parameter, and a forward that takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.down[expert]


def test_factors_are_changed_where_a_piece_is_multiplied() -> None:
    bank, x = Bank(), torch.randn(3, 4, requires_grad=True)
    second = bank.down[1].storage_offset()

    def change(left: Tensor, offset: int) -> Tensor:
        return left * (3 if offset == second else 1)

    first, plain = bank(x, 0), bank(x, 1)
    change_of = {bank: ("down", Bank.forward, change)}
    with replacing_factors(change_of):
        torch.testing.assert_close(bank(x, 0), first)
        torch.testing.assert_close(bank(x, 1), 3 * plain)
        gradient = torch.autograd.grad(bank(x, 1).sum(), x)[0]
        with replacing_factors(change_of):
            torch.testing.assert_close(bank(x, 1), 9 * plain)
    torch.testing.assert_close(gradient, 3 * bank.down[1].sum(1).expand(3, 4))
    assert torch.equal(bank(x, 1), plain)
    assert "forward" not in vars(bank)


def test_a_module_that_multiplies_otherwise_is_refused() -> None:
    bank = Bank()

    def add(module: nn.Module, x: Tensor, expert: int) -> Tensor:
        return x.sum() + module.down[expert]  # type: ignore[no-any-return]

    with (
        replacing_factors({bank: ("down", add, lambda left, offset: left)}),
        pytest.raises(UnsupportedModelError, match="piece by piece"),
    ):
        bank(torch.ones(3, 4), 0)
