# SPDX-License-Identifier: Apache-2.0
"""numpy's .npy files, versions 1.0 to 3.0 (numpy.lib.format has the specification).

numpy parses the header; this module bounds what numpy is given, and checks what it gives back.
Extension dtypes such as bfloat16 are written by numpy as "|V2" and stay that here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..dtypes import EXTENSION_DTYPES, dtype_to_json
from ..errors import FormatError, UnsupportedDtype, UnsupportedFormat
from ..store import locations
from ..store.base import Blob
from .base import ArrayEntry, Directory, array_size, damaged, unsupported

MAGIC: Final = b"\x93NUMPY"
ARRAY_NAME: Final = "data"

#: The header is a Python literal, and parsing one costs some hundred bytes of memory a character.
MAX_HEADER: Final = 1 << 20
#: Magic, version and the longer of the two length fields: enough to know the header's size.
PREFIX: Final = 12
#: Read of a member of an .npz; beyond any header that numpy writes for a plain dtype.
FIRST_READ: Final = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy header says; `size` is where the array's bytes begin."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    size: int
    nbytes: int


def header_size(prefix: bytes, *, url: str, field: str) -> int:
    """Bytes before the array's, from the file's first `PREFIX` bytes (fewer if it is shorter)."""
    if not prefix.startswith(MAGIC):
        raise damaged(url, field, f"begins with {prefix[:6]!r} instead of numpy's magic")
    if len(prefix) < PREFIX:
        raise damaged(url, field, f"ends after {len(prefix)} bytes, within the .npy header")
    major, minor = prefix[6], prefix[7]
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        raise unsupported(
            url, field, f"is .npy version {major}.{minor}", "save it with a numpy that writes 1.0 to 3.0"
        )
    width = 2 if major == 1 else 4
    length = int.from_bytes(prefix[8 : 8 + width], "little")
    if length > MAX_HEADER:
        raise damaged(url, field, f"declares a .npy header of {length} bytes (the limit is {MAX_HEADER})")
    return 8 + width + length


def parse_header(data: bytes, *, url: str, field: str, name: str) -> Header:
    """Parse `data`, which holds exactly the bytes that `header_size` counted. name: the array's."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (3, 0):
            # numpy has no public reader of 3.0, which is 2.0 with UTF-8: escapes say the same in Latin-1.
            text = data[PREFIX:].decode("utf-8").encode("ascii", "backslashreplace")
            stream = io.BytesIO(len(text).to_bytes(4, "little") + text)
        form = np.lib.format
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=10 * MAX_HEADER)
    except Exception as error:  # numpy evaluates a literal, and hands on whatever that raises
        raise damaged(url, field, f"has a .npy header that numpy refuses ({str(error)[:200]})") from None
    try:
        dtype_to_json(dtype, name=name)
    except UnsupportedDtype as error:
        raise UnsupportedFormat(f"{url}: {error} (numpy.load may read it)", url=url, field=field) from None
    nbytes = array_size(shape, dtype.itemsize)
    if nbytes is None:
        raise damaged(url, field, f"has the impossible shape {str(shape)[:200]}")
    return Header(dtype, shape, "F" if fortran and len(shape) > 1 else "C", len(data), nbytes)


def make_header(dtype: np.dtype[Any], shape: tuple[int, ...], order: str, *, name: str) -> bytes:
    """The header of a .npy file, as numpy.save would write it in the oldest version that can say it.

    Extension dtypes become void of their size, as numpy has no name for them. Raises
    `UnsupportedDtype` where they are fields of a structure.
    """
    if dtype in EXTENSION_DTYPES.values():
        dtype = np.dtype((np.void, dtype.itemsize))
    descr = np.lib.format.dtype_to_descr(dtype)
    if dtype_to_json(np.lib.format.descr_to_dtype(descr)) != dtype_to_json(dtype):
        raise UnsupportedDtype(
            f"array {name!r} has dtype {str(dtype)[:200]}, which .npy cannot express; extract its raw bytes"
        )
    literal = {"descr": descr, "fortran_order": order == "F", "shape": shape}
    text = repr(literal).encode("utf-8")
    version = 1 if text.isascii() and len(text) < 65_000 else 2 if text.isascii() else 3
    start = 10 if version == 1 else PREFIX
    text += b" " * (-(start + len(text) + 1) % 64) + b"\n"  # so that the array's bytes are aligned
    return MAGIC + bytes([version, 0]) + len(text).to_bytes(start - 8, "little") + text


def read_npy(blob: Blob, head: bytes) -> Directory:
    """The directory of a .npy file: one array, named "data". What follows it in the file is ignored.

    head: its first bytes, as `read_head` gives them.
    """
    url, field = blob.url, "the header"
    size = header_size(head[:PREFIX], url=url, field=field)
    if size > blob.size:
        raise damaged(url, field, f"has {size} bytes, but the file has {blob.size}")
    data = head[:size] if size <= len(head) else blob.read(0, size)
    header = parse_header(data, url=url, field=field, name=ARRAY_NAME)
    if header.nbytes > blob.size - size:
        raise FormatError(
            f"{url}: array {ARRAY_NAME!r} needs {header.nbytes} bytes from byte {size}, but the file has "
            f"{blob.size}; it is cut short, so get it again",
            url=url,
            field=ARRAY_NAME,
        )
    entry = ArrayEntry(
        name=ARRAY_NAME,
        dtype=header.dtype,
        shape=header.shape,
        order=header.order,
        file=0,
        offset=size,
        nbytes=header.nbytes,
        stored_length=header.nbytes,
    )
    return Directory("npy", (blob,), (locations.name_of(url),), (entry,))
