# SPDX-License-Identifier: Apache-2.0
"""Which container a file is: by its first bytes, then by its suffix, else raw bytes.

A file that has a format's suffix but breaks the format is that format's error, never raw bytes.
"""

from __future__ import annotations

import os
from typing import Final

from ..errors import FormatError, OptionError
from ..store import locations
from ..store.base import Blob, Opener
from . import folder, gguf, npy, npz, raw, safetensors, torchzip, zipped
from .base import Directory, read_head, unsupported

FORMATS: Final = ("raw", "npy", "npz", "safetensors", "safetensors-sharded", "torch", "gguf")

# What torch.save wrote before 1.6, and on request still does: first a pickled magic number, of any protocol.
_TORCH_LEGACY: Final = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TORCH_LEGACY_WITHIN: Final = 32


def is_sharded(location: str, opener: Opener) -> bool:
    """Whether `location` is a folder or an index of shards, so that it is no one file to look into."""
    return opener.is_folder(location) or folder.is_index(location)


def open_container(
    location: str, opener: Opener, *, as_format: str | None = None, whole: bool = False
) -> Directory:
    """Open `location`, a file or a folder, and read what arrays it holds.

    as_format: one of `FORMATS`, to take the file for that instead of finding out.
    whole: open all files of a folder that belong to its model, those without arrays too.
    The caller closes the directory. Raises `FormatError`, `UnsupportedFormat`, `ReadError`,
    `SnapshotNotFound`, `AccessDenied`.
    """
    if as_format is not None and as_format not in FORMATS:
        raise OptionError(f"the format is {as_format!r}; it must be one of {', '.join(FORMATS)}")
    if as_format in (None, "safetensors", "safetensors-sharded") and is_sharded(location, opener):

        def read(blob: Blob, head: bytes) -> Directory:
            return read_container(blob, head, as_format and "safetensors")

        if opener.is_folder(location):
            return folder.read_folder(location, opener, read, whole=whole)
        return folder.read_index(location, opener, read)
    if as_format == "safetensors-sharded":
        shown = locations.display(location)
        raise OptionError(f"{shown}: is no folder and no *{folder.INDEX_SUFFIXES[0]}; name one or the other")
    blob = opener.open(location)
    try:
        return raw.read_raw(blob) if as_format == "raw" else read_container(blob, read_head(blob), as_format)
    except BaseException:
        blob.close()
        raise


def read_container(blob: Blob, head: bytes, as_format: str | None = None) -> Directory:
    """The directory of one file, which it takes over unless it raises. head: as `read_head` gives it."""
    suffix = os.path.splitext(locations.name_of(blob.url))[1].lower()
    if as_format == "npy" or (as_format is None and head.startswith(npy.MAGIC)):
        return npy.read_npy(blob, head)
    if _TORCH_LEGACY in head[:_TORCH_LEGACY_WITHIN] and as_format in (None, "torch"):
        raise unsupported(
            blob.url,
            "the file",
            "was written by torch.save in its old format, without zip",
            "torch.load it and torch.save it again, or save it as safetensors; "
            'as_format="raw" shows its plain bytes',
        )
    if as_format == "npz" or (as_format is None and head.startswith(zipped.MAGICS)):
        return _read_zip(blob, head, as_format == "npz" or suffix == ".npz")
    if as_format == "torch":
        return torchzip.read_torch(blob, head)
    if as_format == "gguf" or (as_format is None and head.startswith(gguf.MAGIC)):
        return gguf.read_gguf(blob, head)
    if as_format == "safetensors" or safetensors.looks_like(head, blob.size):
        return safetensors.read_safetensors(blob, head)
    if suffix == ".npy":
        return npy.read_npy(blob, head)
    if suffix == ".npz":
        return npz.read_npz(blob)
    if suffix == safetensors.SUFFIX:
        return safetensors.read_safetensors(blob, head)
    if suffix == gguf.SUFFIX:
        return gguf.read_gguf(blob, head)
    return raw.read_raw(blob)


def _read_zip(blob: Blob, head: bytes, must_be_npz: bool) -> Directory:
    """A zip file is an .npz if it says so or holds .npy members; torch's are told apart from others."""
    try:
        members = zipped.list_members(blob)
    except FormatError:
        if must_be_npz or os.path.splitext(locations.name_of(blob.url))[1].lower() in torchzip.SUFFIXES:
            raise
        return raw.read_raw(blob)
    if must_be_npz or any(info.filename.endswith(".npy") for info in members):
        return npz.read_npz(blob, members)
    if torchzip.prefix_of(members) is not None:
        return torchzip.read_torch(blob, head, members)
    return raw.read_raw(blob)
