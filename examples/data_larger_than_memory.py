"""Statistics of a folder of files, read in bounded memory, at the front of a network that is shipped as one file.

    python examples/data_larger_than_memory.py [--rows 200000]

Writes a folder of ``.npy`` files of sensor readings whose units differ by orders of magnitude, learns their mean and
deviation file by file, trains a network behind them, and saves both as one file, which takes raw readings. More rows
need more disk, not more memory: no array here holds more than one file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import batchnorm as bn
from batchnorm.preprocessing import StandardScaler, load_model, save_model

FILES = 8
UNITS = np.array([1e5, 300.0, 0.4, 1e-3], dtype=np.float64)  # pascal, kelvin, a share, metres
SPREAD = np.array([900.0, 8.0, 0.1, 2e-4], dtype=np.float64)


def readings(number: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """One file's readings and what is to be predicted of them."""
    z = np.random.default_rng(number).normal(size=(rows, 4))
    return (UNITS + SPREAD * z).astype(np.float32), (z @ [1.0, -2.0, 0.5, 0.3]).astype(np.float32)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print and return the share of the variance that is explained, of raw readings by the file that was saved."""
    parser = argparse.ArgumentParser(description="A folder of files, statistics, a network, one file.")
    parser.add_argument("--rows", type=int, default=40_000, help="of all files together (default 40,000)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = options.rows // FILES
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            np.save(Path(folder) / f"readings-{number}.npy", readings(number, rows)[0])
        scaler = StandardScaler().fit(Path(folder) / "readings-*.npy")
        print(f"{scaler.n_samples_seen_} rows, means {scaler.mean_}")

        network = nn.Sequential(
            nn.Linear(4, 32, bias=False), bn.nn.BatchNorm1d(32, activation="relu"), nn.Linear(32, 1)
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for number in range(FILES):
            scaled = torch.from_numpy(scaler.transform(np.load(Path(folder) / f"readings-{number}.npy")))
            target = torch.from_numpy(readings(number, rows)[1])
            for batch in torch.randperm(rows).split(100):
                optimizer.zero_grad()
                (network(scaled[batch]).squeeze(1) - target[batch]).square().mean().backward()
                optimizer.step()

        path = Path(folder) / "sensors.pt2"
        new, truth = readings(FILES, 1000)
        save_model(path, scaler, network.eval(), example=new[:2])
        model = load_model(path)  # needs neither the class of the network nor pickle
        answer = model(new).squeeze(1)  # raw readings in
    explained = 1 - float(np.mean((answer - truth) ** 2) / np.var(truth))
    print(f"explained of new readings: {explained:.3f}")
    return {"rows": float(scaler.n_samples_seen_), "explained": explained}


if __name__ == "__main__":
    main()
