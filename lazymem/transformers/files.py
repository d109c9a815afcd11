# SPDX-License-Identifier: Apache-2.0
"""A model's small files in a folder of this machine, for code that reads them by path."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import Any, Final

from .. import snapshot as snapshots
from ..containers.folder import MAX_CARRIED, MAX_CARRIED_BYTES, MAX_DEPTH
from ..errors import BuildError, FormatError
from ..format.origin import unsafe_name
from ..snapshot import Snapshot

#: Weights, by their names' ends: what the snapshot's arrays are, and other formats of the same.
_WEIGHTS: Final = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".npy",
)  # fmt: skip

#: What a name can cause in a folder in which no other name was: it is in another one's way, or too long.
_BAD_NAMES: Final = (
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
)


@contextlib.contextmanager
def local_files(source: str | os.PathLike[str], **options: Any) -> Iterator[str]:
    """A temporary folder with all that `source` carries beside its weights; gone when the block ends.

    source: as for `from_pretrained`. options: of `lazymem.open` (storage_options, cache, ...).
    Reads the files. Raises as `lazymem.open`, `Snapshot.read_file` and `write_files`.
    """
    with (
        snapshots.open(source, **options) as snapshot,
        tempfile.TemporaryDirectory(prefix="lazymem-") as folder,
    ):
        write_files(snapshot, folder)
        yield folder


def write_files(snapshot: Snapshot, folder: str) -> list[str]:
    """Write the files of `snapshot` that are no weights into `folder`; their names.

    As many and as large ones as `build` would carry. Raises `FormatError` for more, and for names that
    cannot be files beside one another; `BuildError` if the disk is full; as `Snapshot.read_file`.
    """
    names = [name for name in snapshot.files if not name.endswith(_WEIGHTS)]
    if len(names) > MAX_CARRIED:
        raise _too_much(snapshot, f"{len(names)} files", f"{MAX_CARRIED} files")
    size = 0
    for name in names:
        why = unsafe_name(name)
        if why is not None:
            raise _bad_name(snapshot, name, why)
        if name.count("/") > MAX_DEPTH:
            raise _bad_name(snapshot, name, f"lies more than {MAX_DEPTH} folders deep")
        data = snapshot.read_file(name)
        size += len(data)
        if size > MAX_CARRIED_BYTES:
            raise _too_much(snapshot, f"{size} bytes or more", f"{MAX_CARRIED_BYTES} bytes")
        _write(snapshot, name, data, folder)
    return names


def _write(snapshot: Snapshot, name: str, data: bytes, folder: str) -> None:
    path = os.path.join(folder, *name.split("/"))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        if error.errno in _BAD_NAMES:
            raise _bad_name(snapshot, name, f"cannot be written ({error.strerror})") from None
        raise BuildError(
            f"{folder}: {name[:200]!r} of {snapshot.url} cannot be written ({error.strerror}); make room, or "
            "set TMPDIR to another folder"
        ) from error


def _bad_name(snapshot: Snapshot, name: str, why: str) -> FormatError:
    return FormatError(
        f"{snapshot.url}: carries a file {name[:200]!r} that {why}; get the snapshot again",
        url=snapshot.url,
        field=name,
    )


def _too_much(snapshot: Snapshot, found: str, limit: str) -> FormatError:
    return FormatError(
        f"{snapshot.url}: carries {found} beside the weights (the limit is {limit}); build a snapshot of "
        "what belongs to the model",
        url=snapshot.url,
        field="the files",
    )
