# SPDX-License-Identifier: Apache-2.0
"""A model's small files in a folder of this machine, for code that reads them by path."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any, Final

from .. import snapshot as snapshots
from ..errors import FormatError
from ..format.origin import unsafe_name
from ..snapshot import Snapshot

#: Weights, by their names' ends: what the snapshot's arrays are, and other formats of the same.
_WEIGHTS: Final = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".npy",
)  # fmt: skip


@contextlib.contextmanager
def local_files(source: str | os.PathLike[str], **options: Any) -> Iterator[str]:
    """A temporary folder with all that `source` carries beside its weights; gone when the block ends.

    source: as for `from_pretrained`. options: of `lazymem.open` (storage_options, cache, ...).
    Reads the files. Raises as `lazymem.open` and `Snapshot.read_file`.
    """
    with (
        snapshots.open(source, **options) as snapshot,
        tempfile.TemporaryDirectory(prefix="lazymem-") as folder,
    ):
        write_files(snapshot, folder)
        yield folder


def write_files(snapshot: Snapshot, folder: str) -> list[str]:
    """Write the files of `snapshot` that are no weights into `folder`; their names."""
    written = []
    for name in snapshot.files:
        if name.endswith(_WEIGHTS):
            continue
        why = unsafe_name(name)
        if why is not None:
            raise FormatError(
                f"{snapshot.url}: carries a file {name[:200]!r} that {why}; get the snapshot again",
                url=snapshot.url,
                field=name,
            )
        path = os.path.join(folder, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(snapshot.read_file(name))
        written.append(name)
    return written
