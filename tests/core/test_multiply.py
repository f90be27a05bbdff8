"""The faster product gives the same numbers and gradients, and only where it may be taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factsmith.core import multiply
from factsmith.core.multiply import are_quick, quick_products
from factsmith.model.products import products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN got, with oneDNN as the faster library."""
    shapes: list[tuple[int, ...]] = []
    product = multiply._product

    def counted(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(given.shape))
        return product(given, weight, bias)

    monkeypatch.setattr(multiply, "is_quicker", lambda _: True)
    monkeypatch.setattr(multiply, "_product", counted)
    return shapes


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    "module", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)]
)
def test_products_and_gradients_are_those_of_double_precision(
    module: nn.Module, sent: list[tuple[int, ...]]
) -> None:
    frozen(module)
    given = drawn(3, 5, 24).requires_grad_()
    with quick_products():
        out = module(given)
        (slope,) = torch.autograd.grad(out, given, out.detach())
    assert len(sent) == 2  # the product, and its gradient
    exact_given = given.detach().double().requires_grad_()
    exact = module.double()(exact_given)
    (exact_slope,) = torch.autograd.grad(exact, exact_given, exact.detach())
    module.float()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-5, atol=1e-5)
    with quick_products():  # a wrong operand is noticed
        assert not torch.allclose(module(given + 1e-3).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_the_gradient_exists(sent: list[tuple[int, ...]]) -> None:
    layer = frozen(nn.Linear(24, 40))
    given = drawn(9, 24).requires_grad_()

    def curvature() -> Tensor:
        (slope,) = torch.autograd.grad(layer(given).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), given)[0]

    plain = curvature()
    with quick_products():
        torch.testing.assert_close(curvature(), plain, rtol=1e-4, atol=1e-4)
    assert sent


def under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(nn.Linear(24, 40))(drawn(9, 24)).dtype == torch.bfloat16


def watched() -> None:
    layer = frozen(nn.Linear(24, 40))
    with products({"weight": layer.weight}) as seen:
        layer(drawn(9, 24))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "run",
    [
        lambda: nn.Linear(24, 40)(drawn(9, 24)),  # its weight needs a gradient
        lambda: frozen(nn.Linear(24, 40))(drawn(3, 24)),  # too few rows
        lambda: frozen(nn.Linear(24, 40).double())(drawn(9, 24).double()),
        lambda: frozen(nn.Linear(24, 40).bfloat16())(drawn(9, 24).bfloat16()),
        lambda: torch.addmm(drawn(9, 40), drawn(9, 24), drawn(24, 40)),  # no bias, but a matrix
        lambda: nn.functional.linear(drawn(9, 24), frozen(nn.Linear(24, 40)).weight[:8]),
        lambda: under_autocast(),
        lambda: watched(),
    ],
    ids=["trained", "few", "double", "half", "sum", "slice", "autocast", "watched"],
)
def test_other_products_stay_as_they_are(
    run: Callable[[], Tensor], sent: list[tuple[int, ...]]
) -> None:
    with quick_products():
        run()
    assert sent == []
    frozen_layer = frozen(nn.Linear(24, 40))
    with quick_products():
        frozen_layer(drawn(9, 24))
    assert sent == [(9, 24)]
    frozen_layer(drawn(9, 24))  # and after the block nothing is changed
    assert len(sent) == 1


def test_a_block_is_known_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "is_quicker", lambda _: True)
    with pytest.raises(KeyError), quick_products(), quick_products():
        assert are_quick()
        raise KeyError
    assert not are_quick()
    monkeypatch.setattr(multiply, "is_quicker", lambda _: False)
    with quick_products():
        assert not are_quick()


def test_a_library_that_is_not_clearly_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = iter([1.0, 1.0, 2.0, 1.0])  # the usual one, then oneDNN
    monkeypatch.setattr(multiply, "_fastest", lambda _: next(speed))
    assert not multiply.is_quicker.__wrapped__(1)
    assert multiply.is_quicker.__wrapped__(1)
    monkeypatch.setattr(multiply, "_product", lambda *_: torch.zeros(128, 1536))
    assert not multiply.is_quicker.__wrapped__(1)  # wrong numbers
