# SPDX-License-Identifier: Apache-2.0
"""Models that are a folder: shards with an index that says which tensor is where, and all that lies beside.

A shard is any container file that holds named tensors; what it is, its content decides, by the same
dispatch as for a file alone. The index is Hugging Face's
(https://huggingface.co/docs/transformers/big_models, "Sharded checkpoints").

Owns which files of a folder are the model's weights, which others belong to it and are carried along by
`build`, and which are left out: those that hold the weights once more, for another framework or runtime,
hidden ones, and what is no file of the folder. Of a folder that comes from somebody else a link could put
any file of this machine into a snapshot that is given away; so links that lead out of it are followed by
`build` for the weights only, which must hold tensors, and in Hugging Face's cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, TypeVar

from ..errors import AccessDenied, FormatError, LazymemError, OptionError, SnapshotNotFound
from ..store import locations
from ..store.base import Blob, Entries, Opener
from .base import ArrayEntry, Directory, damaged, read_head, unsupported
from .safetensors import SUFFIX
from .strict_json import load_json

INDEX_SUFFIXES: Final = (".safetensors.index.json", ".bin.index.json")
MAX_INDEX: Final = 100_000_000
#: Files beside the weights that `build` carries, and their bytes. Each takes a descriptor meanwhile.
MAX_CARRIED: Final = 256
MAX_CARRIED_BYTES: Final = 1 << 30
#: Sub-folders in one another.
MAX_DEPTH: Final = 8

_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES: Final = ("model.safetensors", "pytorch_model.bin")
_CONFIG: Final = "config.json"
_MAX_SEEN: Final = 10_000
#: Files that hold weights, whoever's; beside safetensors they hold the same ones.
_WEIGHTS: Final = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite", ".gguf", ".ggml", ".lzm"),
)
#: Sub-folders that hold the same model for another runtime.
_RUNTIMES: Final = frozenset(("onnx", "openvino", "coreml", "tflite", "gguf", "original"))
#: Of a remote model: each costs a round trip or two.
_OPENED_AT_ONCE: Final = 16
_UNNAMED: Final = ("raw", "npy")

#: Reads one file, of which it is given the first bytes; takes the blob over unless it raises.
ReadFile = Callable[[Blob, bytes], Directory]
_Item = TypeVar("_Item", Blob, Directory)


def is_index(location: str) -> bool:
    """Whether the name says that it is an index of shards."""
    return locations.name_of(location).endswith(INDEX_SUFFIXES)


def read_folder(folder: str, opener: Opener, read: ReadFile, *, whole: bool = False) -> Directory:
    """The directory of a folder that holds a model: by its index, else all of its weights.

    whole: with all other files that belong to the model, opened, as files without arrays; `left_out`
    then names the others. Where both safetensors and torch's files are there, safetensors are taken.
    """
    url = locations.display(folder)
    if not whole:
        # Nearly always the index has this name. To ask for it costs less than to list, which http cannot
        # do at all. Some stores say "denied" instead of "not found" to those who may not list.
        index = opener.join(folder, _INDEXES[0])
        try:
            blob = opener.open(index)
        except (SnapshotNotFound, AccessDenied):
            pass
        else:
            return _read_index(blob, index, opener, read)
    try:
        entries = _entries(folder, opener)
    except OptionError:
        return _read_unlisted(folder, opener, read, whole)
    files = [name for name in entries.names if not name.endswith("/")]
    chosen_index, shards = _choose(files, url)
    if chosen_index is not None:
        directory = read_index(opener.join(folder, chosen_index), opener, read)
    else:
        directory = _merge(_open_shards(folder, shards, opener, url, read), url)
    directory = replace(directory, folder=folder)
    return _carry(directory, opener, entries) if whole else directory


def read_index(location: str, opener: Opener, read: ReadFile) -> Directory:
    """The directory of a sharded model, from its index."""
    return _read_index(opener.open(location), location, opener, read)


def list_files(folder: str, opener: Opener) -> list[str]:
    """Names of the files in `folder` and below, relative to it; without hidden ones.

    Raises `OptionError` where the store cannot list; `FormatError` if there are too many.
    """
    return _walk(folder, opener, _entries(folder, opener)).names


def location_in(folder: str, name: str, opener: Opener) -> str:
    """The location of the file `name`, which may lie in sub-folders."""
    for part in name.split("/"):
        folder = opener.join(folder, part)
    return folder


# ---- which files ----


def _entries(folder: str, opener: Opener) -> Entries:
    try:
        return opener.entries(folder)
    except LazymemError:
        raise
    except OSError as error:
        url = locations.display(folder)
        raise AccessDenied(
            f"{url}: the folder cannot be listed ({error.strerror}); check its mode", url=url
        ) from error


def _choose(files: list[str], url: str) -> tuple[str | None, list[str]]:
    """The name of the model's index, or, if it has none, the names of its weights."""
    for suffix, standard, single in zip(INDEX_SUFFIXES, _INDEXES, _SINGLES, strict=True):
        indexes = [name for name in files if name.endswith(suffix)]
        if standard in indexes:
            return standard, []
        if single in files and _CONFIG in files:
            return None, [single]
        if len(indexes) > 1:
            found = f"holds {len(indexes)} models ({', '.join(indexes)[:200]})"
            raise unsupported(url, "the folder", found, "name one of them")
        if indexes:
            return indexes[0], []
        # Torch's .bin files may be anything (training_args.bin), so that only the one name is taken.
        ending = SUFFIX if suffix.startswith(SUFFIX) else single
        shards = [name for name in files if name.endswith(ending)]
        if shards:
            return None, shards
    raise unsupported(
        url, "the folder", f"holds no {SUFFIX} file and no {_SINGLES[1]}", "name a file, or another folder"
    )


def _read_unlisted(folder: str, opener: Opener, read: ReadFile, whole: bool) -> Directory:
    """Where a folder cannot be listed (http), its weights are found by the names that they usually have."""
    url = locations.display(folder)
    for name in (*_INDEXES[: 1 if whole else 0], _SINGLES[0], _INDEXES[1], _SINGLES[1]):
        location = opener.join(folder, name)
        try:
            blob = opener.open(location)
        except (SnapshotNotFound, AccessDenied):
            continue
        if is_index(name):
            directory = _read_index(blob, location, opener, read)
        else:
            directory = _merge([_read_shard(blob, read)], url)
        missing = ("all other files, because the server cannot list a folder",) if whole else ()
        return replace(directory, folder=folder, left_out=missing)
    raise unsupported(
        url,
        "the folder",
        f"cannot be listed, and holds none of {', '.join((*_INDEXES, *_SINGLES))}",
        "name a file in it",
    )


def _walk(folder: str, opener: Opener, entries: Entries) -> Entries:
    """Files below `folder`, whose own entries are given, and what is neither file nor folder.

    Without hidden ones.
    """
    files: list[str] = []
    others: list[str] = []
    pending, seen = [("", folder, entries)], 0
    while pending:
        prefix, location, (names, unusual) = pending.pop()
        seen += len(names) + len(unusual)
        if seen > _MAX_SEEN or prefix.count("/") > MAX_DEPTH:
            url = locations.display(folder)
            raise FormatError(
                f"{url}: the folder holds more than {_MAX_SEEN} files, or sub-folders {MAX_DEPTH} deep, and "
                "is taken for no model; name the file of weights in it",
                url=url,
                field="the folder",
            )
        for name in names:
            if name.startswith("."):
                continue
            if name.endswith("/"):
                below = opener.join(location, name[:-1]) + "/"
                pending.append((prefix + name, below, _entries(below, opener)))
            else:
                files.append(prefix + name)
        others += [prefix + name for name in unusual if not name.startswith(".")]
    return Entries(files, others)


def _is_repetition(path: str, paths: set[str]) -> bool:
    """Whether the file, none of the chosen ones, holds the model's weights once more."""
    folder, _, name = path.rpartition("/")
    if folder.split("/")[0] in _RUNTIMES:
        return True
    suffix = os.path.splitext(name.removesuffix(".index.json"))[1].lower()
    if suffix not in _WEIGHTS:
        return False
    if not folder:
        return True
    # A module of its own (2_Dense/model.safetensors), unless it is there twice.
    return suffix != SUFFIX and any(
        other.startswith(folder + "/") and other.endswith(SUFFIX) and other.count("/") == path.count("/")
        for other in paths
    )


def _carry(directory: Directory, opener: Opener, entries: Entries) -> Directory:
    """The same with the folder's other files, or an error; then it is closed."""
    folder = directory.folder or ""
    url = locations.display(folder)
    opened: list[Blob] = []
    try:
        taken = {*directory.file_names, *directory.extra_files}
        found = _walk(folder, opener, entries)
        paths = set(found.names) - taken
        left_out = {
            path
            for path in paths
            if _is_repetition(path, paths)
            or "\\" in path
            or not path.isprintable()
            or opener.leads_out(location_in(folder, path, opener), folder)
        }
        carried = sorted(paths - left_out)
        if len(carried) > MAX_CARRIED:
            raise _too_much(url, f"{len(carried)} files", f"{MAX_CARRIED} files")
        opened = _open_all(folder, carried, lambda path: opener.open(location_in(folder, path, opener)))
        size = sum(blob.size for blob in opened)
        if size > MAX_CARRIED_BYTES:
            largest = max(opened, key=lambda blob: blob.size)
            raise _too_much(url, f"{size} bytes (the largest is {largest.url})", f"{MAX_CARRIED_BYTES} bytes")
    except BaseException:
        for blob in (*opened, *directory.files):
            blob.close()
        raise
    return replace(
        directory,
        files=[*directory.files, *opened],
        file_names=[*directory.file_names, *carried],
        left_out=sorted(left_out.union(found.others)),
    )


def _too_much(url: str, found: str, limit: str) -> FormatError:
    return FormatError(
        f"{url}: the folder holds {found} beside the weights (the limit is {limit}); move out what does not "
        "belong to the model, or name the file of weights instead of the folder",
        url=url,
        field="the folder",
    )


# ---- index and shards ----


def _read_index(blob: Blob, location: str, opener: Opener, read: ReadFile) -> Directory:
    with contextlib.closing(blob):
        path = blob.url
        if blob.size > MAX_INDEX:
            raise damaged(path, "the index", f"has {blob.size} bytes (the limit is {MAX_INDEX})")
        content = blob.read(0, blob.size)
    index = load_json(content, path, "the index")
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
    folder = opener.parent(location)
    opened = _open_shards(folder, sorted(set(weight_map.values())), opener, path, read)
    directory = _merge(opened, path, weight_map, metadata)
    return replace(directory, extra_files={locations.name_of(path): content}, folder=folder)


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _read_shard(blob: Blob, read: ReadFile) -> Directory:
    try:
        directory = read(blob, read_head(blob))
        if directory.format in _UNNAMED:
            raise unsupported(
                blob.url, "the shard", "holds no named tensors", "name a file or folder that does"
            )
    except BaseException:
        blob.close()
        raise
    return directory


def _open_shards(
    folder: str, shards: Sequence[str], opener: Opener, url: str, read: ReadFile
) -> list[Directory]:
    """Open and parse them. url: of the index or folder that names them."""

    def open_shard(name: str) -> Directory:
        try:
            blob = opener.open(opener.join(folder, name))
        except SnapshotNotFound:
            raise FormatError(
                f"{url}: the shard {name!r} is missing; download it into the same folder", url=url, field=name
            ) from None
        return _read_shard(blob, read)

    return _open_all(folder, shards, open_shard)


def _open_all(folder: str, names: Sequence[str], open_one: Callable[[str], _Item]) -> list[_Item]:
    """Open files of `folder`, remote ones several at a time: all of them, or an error and none."""
    if not names:
        return []
    workers = min(len(names), _OPENED_AT_ONCE) if locations.scheme_of(folder) else 1
    pool = ThreadPoolExecutor(workers, "lazymem-shards")
    opened = [pool.submit(open_one, name) for name in names]
    try:
        return [future.result() for future in opened]
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in opened:
            if not future.cancelled() and future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown(wait=True)


def _merge(
    shards: Sequence[Directory],
    url: str,
    weight_map: dict[str, str] | None = None,
    index_metadata: dict[str, Any] | None = None,
) -> Directory:
    """One directory of all of them, which it takes over unless it raises. url: of their index or folder."""
    metadata: dict[str, Any] = {}
    owner: dict[str, str] = {}  # tensor -> its shard
    arrays: list[ArrayEntry] = []
    try:
        for number, shard in enumerate(shards):
            name = shard.file_names[0]
            for tensor in (*(entry.name for entry in shard.arrays), *(view.name for view in shard.views)):
                if tensor in owner:
                    found = f"is in shard {owner[tensor]!r} too"
                    raise damaged(shard.files[0].url, _tensor(tensor), found)
                owner[tensor] = name
            arrays += [entry._replace(file=number) for entry in shard.arrays] if number else shard.arrays
            metadata = {**shard.metadata, **metadata}
        for tensor, name in (weight_map or {}).items():
            if owner.get(tensor) != name:
                raise damaged(url, _tensor(tensor), f"is not in its shard {name!r}")
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    form = shards[0].format
    return Directory(
        f"{form}-sharded" if weight_map is not None or len(shards) > 1 else form,
        [shard.files[0] for shard in shards],
        [shard.file_names[0] for shard in shards],
        arrays,
        {**metadata, **(index_metadata or {})},
        views=[view for shard in shards for view in shard.views],
    )


def _tensor(name: str) -> str:
    return f"tensor {name[:200]!r}"
