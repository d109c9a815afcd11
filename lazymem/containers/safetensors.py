# SPDX-License-Identifier: Apache-2.0
"""safetensors files, alone or as the shards of a model.

A file is 8 bytes of header length, a JSON header, and a buffer that the tensors cover without hole
or overlap (https://github.com/huggingface/safetensors, "Format"). The rules here are those that the
`safetensors` package enforces, and stricter in three points: a key may not stand twice, a tensor is
an object and not a list, and its shape is one that numpy can have.

F4 and F6 tensors are packed: numpy can only show their bytes. Such an array is uint8; its last
dimension counts the bytes of one row where a row fills whole bytes, else it has one dimension, all
bytes. `ArrayEntry.metadata` keeps the tensor's own "dtype" and "shape".
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, Final, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from ..errors import AccessDenied, BuildError, FormatError, LazymemError, SnapshotNotFound
from ..store import locations
from ..store.base import Blob, Opener
from .base import ArrayEntry, Directory, array_size, damaged, read_head, unsupported

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
MAX_HEADER: Final = 100_000_000  # the package's limit

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "C64": "<c8",
        "F64": "<f8",
        "I64": "<i8",
        "U64": "<u8",
    }.items()
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
PACKED_BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_KEY_END: Final = re.compile(r'"[ \t\n\r]*:')
#: Shards of a remote model: each costs a round trip or two.
_OPENED_AT_ONCE: Final = 16
_UINT8: Final = np.dtype(np.uint8)
_HEADER: Final = "the header"


def looks_like(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` can be a safetensors file."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and 2 <= length <= min(MAX_HEADER, size - 8) and head[8:9] == b"{"


def read_safetensors(blob: Blob, head: bytes) -> Directory:
    """The directory of one safetensors file. head: as `read_head` gives it."""
    arrays, metadata = _parse(blob, head, 0)
    return Directory("safetensors", (blob,), (locations.name_of(blob.url),), arrays, metadata)


def read_folder(folder: str, opener: Opener) -> Directory:
    """The directory of a folder that holds a sharded model: by its index, else all *.safetensors."""
    # Nearly always the index has this name. To ask for it costs less than to list, which http cannot do at
    # all. Some stores say "denied" instead of "not found" to those who may not list.
    index = opener.join(folder, "model" + INDEX_SUFFIX)
    try:
        blob = opener.open(index)
    except (SnapshotNotFound, AccessDenied):
        pass
    else:
        return _read_index(blob, index, opener)
    url = locations.display(folder)
    try:
        names = opener.list(folder)
    except LazymemError:
        raise
    except OSError as error:
        raise AccessDenied(
            f"{url}: the folder cannot be listed ({error.strerror}); check its mode", url=url
        ) from error
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if "model" + INDEX_SUFFIX in indexes:
        indexes = ["model" + INDEX_SUFFIX]
    if len(indexes) > 1:
        found = f"holds {len(indexes)} models ({', '.join(indexes)[:200]})"
        raise unsupported(url, "the folder", found, "name one of them")
    if indexes:
        return read_index(opener.join(folder, indexes[0]), opener)
    shards = [name for name in names if name.endswith(SUFFIX)]
    if not shards:
        raise unsupported(url, "the folder", f"holds no {SUFFIX} file", "name a file, or another folder")
    return _read_shards(_open_shards(folder, shards, opener, url), url, {}, {}, {})


def read_index(location: str, opener: Opener) -> Directory:
    """The directory of a sharded model, from its *.safetensors.index.json."""
    return _read_index(opener.open(location), location, opener)


def _read_index(blob: Blob, location: str, opener: Opener) -> Directory:
    with contextlib.closing(blob):
        path = blob.url
        if blob.size > MAX_HEADER:
            raise damaged(path, "the index", f"has {blob.size} bytes (the limit is {MAX_HEADER})")
        content = blob.read(0, blob.size)
    index = _load_json(content, path, "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "weight_map", "is missing, empty, or no object")
    if metadata is not None and not isinstance(metadata, dict):
        raise damaged(path, "metadata", "is no object")
    for tensor, name in weight_map.items():
        # Shards lie beside their index. Anything else in the name could lead out of the folder.
        if not isinstance(name, str) or not name.isprintable() or not _is_plain(name):
            found = f"has {str(name)[:200]!r} for {tensor[:200]!r}, not the name of a file beside it"
            raise damaged(path, "weight_map", found)
    shards = sorted(set(weight_map.values()))
    extra = {locations.name_of(path): content}
    opened = _open_shards(opener.parent(location), shards, opener, path)
    return _read_shards(opened, path, weight_map, metadata or {}, extra)


def make_header(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]) -> bytes:
    """Length and JSON of a file that holds the tensors (name, dtype, shape, nbytes) in this order.

    Raises `BuildError` if the format cannot hold so many, or one of that name.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, kind, shape, nbytes in tensors:
        if name == "__metadata__":
            raise BuildError(f"no tensor in a safetensors file can be called {name!r}; use another format")
        offsets = [position, position + nbytes]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    if len(text) > MAX_HEADER:
        raise BuildError(f"the safetensors header would have {len(text)} bytes (the limit is {MAX_HEADER})")
    return len(text).to_bytes(8, "little") + text


def dtype_name(
    dtype: np.dtype[Any], shape: tuple[int, ...], own: Mapping[str, Any]
) -> tuple[str, list[int]] | None:
    """What the format calls `dtype`, and the shape it gives; None if it has no such dtype.

    own: the array's metadata, which keeps the dtype and shape of a tensor that is packed.
    """
    bits, packed = PACKED_BITS.get(str(own.get("dtype"))), own.get("shape")
    if bits and dtype == _UINT8 and isinstance(packed, list):
        count = array_size(packed, 1)
        if count is not None and count * bits == 8 * math.prod(shape):
            return str(own["dtype"]), packed
    name = _NAMES.get(dtype)
    return None if name is None else (name, list(shape))


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


class _Shard(NamedTuple):
    name: str
    blob: Blob
    arrays: list[ArrayEntry]
    metadata: dict[str, str]


def _open_shards(folder: str, shards: Sequence[str], opener: Opener, url: str) -> list[_Shard]:
    """Open and parse them, remote ones several at a time. url: of the index or folder that names them."""

    def read(number: int) -> _Shard:
        name = shards[number]
        try:
            blob = opener.open(opener.join(folder, name))
        except SnapshotNotFound:
            raise FormatError(
                f"{url}: the shard {name!r} is missing; download it into the same folder", url=url, field=name
            ) from None
        try:
            return _Shard(name, blob, *_parse(blob, read_head(blob), number))
        except BaseException:
            blob.close()
            raise

    workers = min(len(shards), _OPENED_AT_ONCE) if locations.scheme_of(folder) else 1
    pool = ThreadPoolExecutor(workers, "lazymem-shards")
    opened = [pool.submit(read, number) for number in range(len(shards))]
    try:
        return [future.result() for future in opened]
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in opened:
            if not future.cancelled() and future.exception() is None:
                future.result().blob.close()
        raise
    finally:
        pool.shutdown(wait=True)


def _read_shards(
    shards: Sequence[_Shard],
    url: str,
    weight_map: dict[str, str],
    index_metadata: dict[str, Any],
    extra_files: dict[str, bytes],
) -> Directory:
    """One directory of all of them, which it takes over unless it raises. url: of their index or folder."""
    metadata: dict[str, Any] = {}
    owner: dict[str, str] = {}  # tensor -> its shard
    try:
        for shard in shards:
            for entry in shard.arrays:
                if entry.name in owner:
                    found = f"is in shard {owner[entry.name]!r} too"
                    raise damaged(shard.blob.url, _tensor(entry.name), found)
                owner[entry.name] = shard.name
            metadata = {**shard.metadata, **metadata}
        for tensor, name in weight_map.items():
            if owner.get(tensor) != name:
                raise damaged(url, _tensor(tensor), f"is not in its shard {name!r}")
    except BaseException:
        for shard in shards:
            shard.blob.close()
        raise
    form = "safetensors-sharded" if extra_files or len(shards) > 1 else "safetensors"
    blobs, names = [shard.blob for shard in shards], [shard.name for shard in shards]
    arrays = [entry for shard in shards for entry in shard.arrays]
    return Directory(form, blobs, names, arrays, {**metadata, **index_metadata}, extra_files)


def _load_json(content: bytes, url: str, field: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise damaged(url, field, f"has the key {twice[:200]!r} twice")
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=refuse)
        # The hook makes parsing three times as slow, so it only runs if a key may stand twice: each
        # key in the text is a match, and other matches can only make it run in vain.
        if len(_KEY_END.findall(text)) != _count_keys(value):
            json.loads(text, object_pairs_hook=unique)
    except LazymemError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise damaged(url, field, f"is no valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise damaged(url, field, f"is a JSON {type(value).__name__} instead of an object")
    return value


def _count_keys(value: Any) -> int:
    """Keys of an object and of the objects right in it: all there are, if the header is in order."""
    if not isinstance(value, dict):
        return 0
    return len(value) + sum([len(inner) for inner in value.values() if isinstance(inner, dict)])


def _parse(blob: Blob, head: bytes, file: int) -> tuple[list[ArrayEntry], dict[str, str]]:
    """The arrays of one safetensors file, sorted by offset, and its __metadata__."""
    url, size = blob.url, blob.size
    if len(head) < 8:
        raise damaged(url, _HEADER, f"has a length of 8 bytes, but the file has {size}")
    length = int.from_bytes(head[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise damaged(url, _HEADER, f"has {length} bytes (the limit is {MAX_HEADER}), the file {size}")
    start = 8 + length
    text = head[8:start] if start <= len(head) else blob.read(8, length)
    header = _load_json(text, url, _HEADER)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(url, "__metadata__", "is not an object of strings")
    entries = [_entry(url, name, info, file, start, size - start) for name, info in header.items()]
    # The size breaks ties: an empty tensor lies before the one that begins where it does.
    entries.sort(key=attrgetter("offset", "nbytes"))
    position = start
    for entry in entries:
        if entry.offset != position:
            found = f"begins at byte {entry.offset - start} of the buffer, though {position - start} is next"
            raise damaged(url, _tensor(entry.name), found)
        position += entry.nbytes
    if position != size:
        found = f"has {size - start} bytes, of which the tensors cover {position - start}"
        raise damaged(url, "the buffer", found)
    _check_text(url, [*header, *metadata, *metadata.values()])
    return entries, metadata


def _check_text(url: str, strings: list[str]) -> None:
    # JSON can spell half a surrogate pair, which is no text: it has no UTF-8.
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        raise damaged(url, _HEADER, f"has a name that is no text ({str(error)[-100:]})") from None


def _tensor(name: str) -> str:
    return f"tensor {name[:200]!r}"


def _entry(url: str, name: str, info: Any, file: int, start: int, buffer: int) -> ArrayEntry:
    try:
        kind, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged(url, _tensor(name), "lacks a dtype, a shape or two data_offsets") from None
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= buffer:
        raise damaged(
            url, _tensor(name), f"has data_offsets {str([begin, end])[:100]} in a buffer of {buffer} bytes"
        )
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if not isinstance(shape, list):
        raise damaged(url, _tensor(name), "has a shape that is no list")
    if dtype is None:
        return _packed_entry(url, name, kind, shape, file, start + begin, end - begin)
    nbytes = array_size(shape, dtype.itemsize)
    if nbytes != end - begin:
        _raise_size(url, name, kind, shape, end - begin)
    return ArrayEntry(name, dtype, tuple(shape), "C", file, start + begin, nbytes, nbytes)


def _packed_entry(
    url: str, name: str, kind: object, shape: list[Any], file: int, offset: int, nbytes: int
) -> ArrayEntry:
    bits = PACKED_BITS.get(kind) if isinstance(kind, str) else None
    if bits is None:
        raise unsupported(
            url, _tensor(name), f"has the dtype {str(kind)[:100]!r}", "upgrade lazymem, or convert the tensor"
        )
    count = array_size(shape, 1)
    if count is None or count * bits != 8 * nbytes:
        _raise_size(url, name, kind, shape, nbytes)
    whole_rows = bool(shape) and shape[-1] * bits % 8 == 0
    shown = (*shape[:-1], shape[-1] * bits // 8) if whole_rows else (nbytes,)
    own = {"dtype": kind, "shape": shape}
    return ArrayEntry(name, _UINT8, shown, "C", file, offset, nbytes, nbytes, metadata=own)


def _raise_size(url: str, name: str, kind: object, shape: list[Any], nbytes: int) -> NoReturn:
    found = f"is {kind} of shape {str(shape)[:200]}, which {nbytes} bytes do not hold"
    raise damaged(url, _tensor(name), found)
