"""When statistics have been collected for long enough."""

from __future__ import annotations

from torch import Tensor

from batchnorm.surgery.population import Population, movement

_FIRST = 4  # batches at the first look; fewer say nothing of the spread between them


class Convergence:
    """Looks at 4, 8, 16, ... batches whether statistics still move, by more than chance lets them.

    Attributes:
        settled: whether the tolerance was reached.
        told: the same in words.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.settled = False
        self.told = f"of which fewer than {2 * _FIRST} cannot tell whether they have converged to {tolerance:g}"
        self._next = _FIRST
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def reached(self, population: Population) -> bool:
        """Whether to stop."""
        if population.batches < self._next:
            return False
        self._next *= 2
        population.pool()
        moved, noise, now = 0.0, 0.0, {}
        for each in population.collected.values():
            if each.total is None or not each.reached:
                continue
            name = each.layer.name
            number, mean, products = each.total
            now[name] = (mean, products / number)
            moved = max(moved, *movement(each, *self._before[name])) if name in self._before else float("inf")
            noise = max(noise, each.noise())
        if self._before:
            self.settled = bool(now) and max(moved, noise) <= self.tolerance
            self.told = (
                f"converged to {max(moved, noise):.2g} ({self.tolerance:g} was asked for): moved by {moved:.2g} since "
                f"{population.batches // 2} batches, standard error {noise:.2g}"
            )
        self._before = now
        return self.settled
