"""Learning from data in memory: ours beside scikit-learn, and beside what it costs to read the data once.

float32, one process, ratios from one interleaved run. "over reading" is our StandardScaler.fit over a sum of all values
by torch, which nothing that looks at every value beats by much; "over copying", our transform over ``ndarray.copy``.
"""

from __future__ import annotations

import sklearn.preprocessing as peers
import torch
from sklearn.decomposition import PCA

from batchnorm.preprocessing import MinMaxScaler, StandardScaler, Whitener
from benchmarks.harness import interleave, save, show

SHAPES = ((1_000_000, 32), (200_000, 256), (60_000, 784), (50_000, 3072))
WHITENED = 784  # features: beyond, each fit takes many seconds, and most of them eigenvalues
ROUNDS = 5


def measure(rows: int, columns: int) -> dict[str, object]:
    """One row of the table: times, and the ratios of ours to the peers."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    array = x.numpy()
    ours, theirs = StandardScaler().fit(array), peers.StandardScaler().fit(array)
    calls = {
        "read": x.sum,
        "copy": array.copy,
        "fit": lambda: StandardScaler().fit(array),
        "fit, scikit-learn": lambda: peers.StandardScaler().fit(array),
        "min-max": lambda: MinMaxScaler().fit(array),
        "min-max, scikit-learn": lambda: peers.MinMaxScaler().fit(array),
        "transform": lambda: ours.transform(array),
        "transform, scikit-learn": lambda: theirs.transform(array),
    }
    if columns <= WHITENED:
        calls["whiten"] = lambda: Whitener().fit(array)
        calls["whiten, scikit-learn"] = lambda: PCA(whiten=True, svd_solver="covariance_eigh").fit(array)
    ms = {name: 1e3 * timing.median for name, timing in interleave(calls, rounds=ROUNDS).items()}
    row: dict[str, object] = {
        "shape": f"{rows:,} x {columns}",
        "read ms": ms["read"],
        "fit ms": ms["fit"],
        "over reading": ms["fit"] / ms["read"],
    }
    for name in ("fit", "min-max", "transform", "whiten"):
        row[f"{name}: times faster"] = ms[f"{name}, scikit-learn"] / ms[name] if name in ms else None
    row["transform over copying"] = ms["transform"] / ms["copy"]
    return row


def main() -> None:
    rows = [measure(*shape) for shape in SHAPES]
    show("Statistics of data in memory, float32, beside scikit-learn", rows)
    save("moments", rows)


if __name__ == "__main__":
    main()
