# SPDX-License-Identifier: Apache-2.0
"""Which container a path is: by its first bytes, then by its suffix, else raw bytes.

A file that has a format's suffix but breaks the format is that format's error, never raw bytes.
"""

from __future__ import annotations

import os
from typing import Final

from ..errors import FormatError, OptionError
from ..store.base import Blob
from ..store.local import LocalBlob
from . import npy, npz, raw, safetensors
from .base import Directory, unsupported

FORMATS: Final = ("raw", "npy", "npz", "safetensors", "safetensors-sharded")

# What torch.save wrote before 1.6: a pickled magic number.
_TORCH_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD: Final = 64


def open_container(source: str | os.PathLike[str], *, as_format: str | None = None) -> Directory:
    """Open `source`, a file or a folder, and read what arrays it holds.

    as_format: one of `FORMATS`, to take the file for that instead of finding out.
    The caller closes the directory. Raises `FormatError`, `UnsupportedFormat`, `ReadError`,
    `SnapshotNotFound`, `AccessDenied`.
    """
    path = os.fspath(source)
    if as_format is not None and as_format not in FORMATS:
        raise OptionError(f"the format is {as_format!r}; it must be one of {', '.join(FORMATS)}")
    if as_format in (None, "safetensors", "safetensors-sharded"):
        if os.path.isdir(path):
            return safetensors.read_folder(path)
        if path.endswith(safetensors.INDEX_SUFFIX):
            return safetensors.read_index(path)
    if as_format == "safetensors-sharded":
        raise OptionError(f"{path}: is no folder and no *{safetensors.INDEX_SUFFIX}; name one or the other")
    blob = LocalBlob(path)
    try:
        return _read(blob, as_format)
    except BaseException:
        blob.close()
        raise


def _read(blob: Blob, as_format: str | None) -> Directory:
    if as_format == "raw":
        return raw.read_raw(blob)
    head = blob.read(0, min(_HEAD, blob.size))
    suffix = os.path.splitext(blob.url)[1].lower()
    if as_format == "npy" or (as_format is None and head.startswith(npy.MAGIC)):
        return npy.read_npy(blob)
    if as_format == "npz" or (as_format is None and head.startswith(npz.MAGICS)):
        return _read_zip(blob, as_format == "npz" or suffix == ".npz")
    if as_format == "safetensors" or safetensors.looks_like(head, blob.size):
        return safetensors.read_safetensors(blob)
    if head.startswith(_TORCH_LEGACY):
        raise _torch(blob)
    by_suffix = {
        ".npy": npy.read_npy,
        ".npz": npz.read_npz,
        ".safetensors": safetensors.read_safetensors,
    }
    return by_suffix.get(suffix, raw.read_raw)(blob)


def _read_zip(blob: Blob, must_be_npz: bool) -> Directory:
    """A zip file is an .npz if it says so or holds .npy members; torch's are told apart from others."""
    try:
        members = npz.list_members(blob)
    except FormatError:
        if must_be_npz:
            raise
        return raw.read_raw(blob)
    names = [info.filename for info in members]
    if must_be_npz or any(name.endswith(".npy") for name in names):
        return npz.read_npz(blob, members)
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise _torch(blob)
    return raw.read_raw(blob)


def _torch(blob: Blob) -> FormatError:
    return unsupported(
        blob.url,
        "the file",
        "was written by torch.save, which this version does not read",
        'save it as safetensors, or open it with format="raw" for its plain bytes',
    )
