"""The trial on each card: passes where the kernels are right, names what differs where they are not."""

from __future__ import annotations

import pytest
import torch

from batchnorm.ops.triton import backward, launching, plan, trial
from ops.triton.interpreted.ways import BOTH

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


def test_a_card_that_refuses_to_start_all_programs_together_gets_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, tried, refused = launching.run, [], set[torch.device]()

    def without_room(*arguments: object, launch_cooperative_grid: bool, **options: object) -> None:
        tried.append(launch_cooperative_grid)
        if launch_cooperative_grid:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        launch(*arguments, **options)

    monkeypatch.setattr(plan, "both", BOTH)
    monkeypatch.setattr(launching, "device_of", lambda _: plan.Device(16, 1 << 20))
    monkeypatch.setattr(trial, "SHAPE", (9, 3, 7, 13))  # several tiles to a channel: programs share it
    monkeypatch.setattr(launching, "run", without_room)
    monkeypatch.setattr(launching, "_refused", refused)
    trial.run(torch.device("cpu"))
    assert tried == [True] + 8 * [False]  # asked once; two steps of two passes, each in two launches
    assert refused == {torch.device("cpu")}


def test_another_fault_of_a_launch_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(launching, "run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trial.run(torch.device("cpu"))
