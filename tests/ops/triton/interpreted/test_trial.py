"""The trial on each card: passes where the kernels are right, names what differs where they are not."""

from __future__ import annotations

import pytest
import torch

from batchnorm.ops.triton import backward, trial

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SHAPE", (3, 5, 7, 3))


def test_right_kernels_pass() -> None:
    trial.run(torch.device("cpu"))


@pytest.mark.parametrize(("place", "name"), [(0, "dx"), (1, "dweight"), (3, "the residual's gradient")])
@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_wrong_result_is_named(place: int, name: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = backward.train_backward

    def broken(*arguments: object) -> tuple[torch.Tensor, ...]:
        results = list(right(*arguments))
        results[place] = results[place] * wrong
        return tuple(results)

    monkeypatch.setattr(backward, "train_backward", broken)
    with pytest.raises(RuntimeError, match=f"in float32 differs from the reference by .* in {name}, more than 7.6e-06"):
        trial.run(torch.device("cpu"))
