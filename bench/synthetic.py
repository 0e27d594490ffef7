"""Synthetic ratings of any size as Parquet parts: ``python -m bench.synthetic FOLDER --entries 1e8``.

480,189 x 17,770 by default, the shape of Netflix's data. Like there, a part has the entries of some columns, in no order; rows
and columns are skewed; a value is a product of factors of width 8, biases and noise, so the best error is known: 0.5.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

ROWS, COLUMNS, WIDTH, NOISE = 480_189, 17_770, 8, 0.5


def write_parts(
    folder: Path, entries: int, *, parts: int = 16, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0
) -> list[Path]:
    """``parts`` files of about equal size with ``entries`` distinct pairs in all."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((rows, WIDTH), np.float32) / WIDTH**0.5
    right = rng.standard_normal((columns, WIDTH), np.float32)
    row_bias, col_bias = 0.4 * rng.standard_normal(rows, np.float32), 0.4 * rng.standard_normal(columns, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in range(parts):
        own = np.arange(part, columns, parts)
        wanted = entries // parts + (part < entries % parts)
        keys = np.zeros(0, np.int64)
        while len(keys) < wanted:
            count = int(1.15 * (wanted - len(keys))) + 16
            row = (rows * rng.random(count, np.float32) ** 1.5).astype(np.int64).clip(0, rows - 1)
            col = own[(len(own) * rng.random(count, np.float32) ** 1.7).astype(np.int64).clip(0, len(own) - 1)]
            keys = np.unique(np.concatenate([keys, row * columns + col]))
        keys = rng.permutation(keys)[:wanted]
        row, col = keys // columns, keys % columns
        value = np.empty(wanted, np.float32)
        for begin in range(0, wanted, 1 << 20):
            at = slice(begin, begin + (1 << 20))
            value[at] = np.einsum("pk,pk->p", left[row[at]], right[col[at]]) + row_bias[row[at]] + col_bias[col[at]]
        value += np.float32(NOISE) * rng.standard_normal(wanted, np.float32)
        frame = pl.DataFrame({"user": row.astype(np.int32), "movie": col.astype(np.int16), "rating": value})
        path = folder / f"part-{part:03d}.parquet"
        frame.write_parquet(path, row_group_size=1 << 20)
        written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entries", type=float, default=1e8)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    given = parser.parse_args()
    write_parts(given.folder, int(given.entries), parts=given.parts, rows=given.rows, columns=given.columns)
