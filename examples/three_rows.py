# SPDX-License-Identifier: Apache-2.0
"""Three rows of a huge embedding table: three chunks are read, whatever the table's size.

Needs pip install 'lazymem[torch]'.
"""

import tempfile
from pathlib import Path

import numpy as np

import lazymem
import lazymem.torch

ROWS, WIDTH = 200_000, 256
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "embeddings.lzm")
    table = np.arange(ROWS, dtype=np.float32)[:, None] + np.linspace(0, 0.5, WIDTH, dtype=np.float32)
    lazymem.build({"embedding.weight": table}, path, chunk_size=64 * 1024)

    with lazymem.torch.open(path) as tensors:
        embedding = tensors["embedding.weight"]  # 200 MB, of which nothing is read yet
        rows = embedding[[7, 100_000, 199_999]]
        stats = tensors.snapshot.stats()
        print("rows: ", rows[:, 0].tolist())
        print(f"read:  {stats.chunks_populated} chunks of {tensors.snapshot.chunk_count}")
        del embedding
