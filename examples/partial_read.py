# SPDX-License-Identifier: Apache-2.0
"""A few rows out of an array that is larger than memory: only their chunks are read."""

import tempfile
from pathlib import Path

import numpy as np

import lazymem

ROWS, COLUMNS = 5_000_000, 1024  # 20 GB of float32

with tempfile.TemporaryDirectory() as folder:
    # A .npy file of that size; all but three rows of it are a hole, so it takes no space.
    array = np.lib.format.open_memmap(Path(folder, "big.npy"), "w+", np.float32, (ROWS, COLUMNS))
    wanted = [7, 2_500_000, ROWS - 1]
    array[wanted] = [[1], [2], [3]]
    del array

    # Read in place through a plain mapping: it is an uncompressed local file.
    with lazymem.open(Path(folder, "big.npy")) as snap:
        (name,) = snap
        big = snap[name]
        print(f"{name}: {big.dtype} {big.shape}, {big.nbytes:,} bytes, backend {snap.backend}")
        picked = big[wanted, :4]
        print(picked)
        assert picked.tolist() == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
        del big

    # The same of a compressed snapshot: a gather of rows touches one chunk for each.
    table = np.arange(2000 * COLUMNS, dtype=np.int32).reshape(2000, COLUMNS)
    lazymem.build({"table": table}, Path(folder, "table.lzm"), chunk_size=64 * 1024)
    with lazymem.open(Path(folder, "table.lzm"), readahead=0) as snap:
        rows = snap["table"][[3, 999, 1998]]
        print(f"3 rows: {snap.stats().chunks_populated} of {snap.chunk_count} chunks, backend {snap.backend}")
        assert np.array_equal(rows, table[[3, 999, 1998]])
