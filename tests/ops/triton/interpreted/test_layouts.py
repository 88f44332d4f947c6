"""Every layout, dtype, activation, with and without mask, residual, weight and bias, by each of the three ways."""

from __future__ import annotations

import os

import pytest
import torch

from batchnorm.ops.schema import ACTIVATIONS
from ops.test_kernels import LAYOUTS, Case
from ops.triton.interpreted.comparing import check_backward, check_forward
from ops.triton.interpreted.ways import ROUTES, take

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_this_is_the_interpreter() -> None:
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from batchnorm.ops.triton.kernels.forward import forward

    assert os.environ["TRITON_INTERPRET"] == "1"
    assert triton.knobs.runtime.interpret
    assert isinstance(forward, InterpretedFunction)


# Of the most channels once: they take as long as all others, and are cut as others are.
MANY = "more channels than are summed at a time"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != MANY])
def test_the_kernels_agree_with_the_reference(layout: str, route: str) -> None:
    # Each layout and way takes its turn at dtypes, activations, and the four ways to have a mask or a residual.
    turn = list(LAYOUTS).index(layout) + 2 * ROUTES.index(route)
    dtype, activation = DTYPES[turn % 3], ACTIVATIONS[turn % len(ACTIVATIONS)]
    case = Case.draw(layout, dtype, activation, turn % 2 == 1, turn // 2 % 2 == 1, affine=turn % 5 != 0)
    check(case, f"{layout} {dtype} {activation}", route)


def test_many_channels(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:  # noqa: ARG001
    take("two launches", monkeypatch)
    check(Case.draw(MANY, torch.bfloat16, "relu", False, True, affine=True), MANY, "two launches")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_every_activation_with_and_without_mask_and_residual(
    activation: str,
    masked: bool,
    added: bool,
    monkeypatch: pytest.MonkeyPatch,
    small_tiles: None,  # noqa: ARG001
) -> None:
    turn = ACTIVATIONS.index(activation) + masked + added
    route, layout = ROUTES[turn % 3], ("channels_last, 33", "49 positions")[turn % 2]
    take(route, monkeypatch)
    case = Case.draw(layout, torch.float32, activation, masked, added, affine=True)
    check(case, f"{layout} {activation} {route}", route)


def check(case: Case, label: str, route: str) -> None:
    # The smaller operators are launched the same way whichever way whole steps go.
    parts = route == ROUTES[0]
    check_backward(case, label, *check_forward(case, label, parts=parts), parts=parts)
