# SPDX-License-Identifier: Apache-2.0
"""`extract` and `cat`: a snapshot's bytes back as files of other formats, or as a stream.

Holds one chunk at a time, and of a remote snapshot what is read ahead. Every file appears whole, checked and
synced, or not at all; a name from the snapshot becomes a path only after `unsafe_name` has passed it.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from .containers import npy, safetensors
from .containers.base import Directory, unsupported
from .errors import ArrayNotFound, BuildError, FormatError, OptionError, UnsupportedDtype, UnsupportedFormat
from .format.index import Place
from .format.origin import DeflatedMember, Origin, OriginFile, unsafe_name
from .format.reader import SnapshotReader, open_snapshot
from .opener import LocationOpener, location_of
from .options import StoreOptions
from .recognizer import recognize
from .store import locations
from .store.ahead import AheadBlob
from .store.local import AtomicFile
from .views import gather

StrPath = str | os.PathLike[str]
Cache = str | os.PathLike[str] | bool | None
Progress = Callable[[int, int | None], None]

#: What `extract` can write besides the original container.
FORMATS: Final = ("npz", "npy", "raw", "safetensors")

_PROGRESS_STEP: Final = 1 << 20
_PIECE: Final = 4 << 20
_MIN_HOLE: Final = 1 << 20  # shorter runs of zeros are written
_MAX_ZIP_NAME: Final = 0xFFFF
#: Who names a destination so means a file.
_FILE_SUFFIXES: Final = (".safetensors", ".npz", ".npy", ".pt", ".pth", ".bin", ".gguf")


def extract(
    source: StrPath,
    destination: StrPath,
    *,
    format: str | None = None,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    cache: Cache = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the content of the snapshot `source` to `destination`; return the files written.

    format: None gives back the files that the snapshot was built from, byte for byte and checked
        by their SHA-256; "npz" if it was built from arrays in memory or `names` are given. "npz";
        "npy": one array, or a folder with a file for each; "raw": the bytes of the one array
        named, or of the whole content; "safetensors".
    names: the arrays to write; None writes all. Of a remote snapshot only their chunks are fetched.
    destination: a local file, or, where several are written, a folder, made if need be unless it is
        called like a file (.safetensors, .npz ...). Where it is an existing folder, a single file goes into
        it. overwrite: replace files that exist.
    storage_options, cache: as for `open`, but cache=None is none, whatever the environment says: what is
        read once would push out what is touched often.
    progress: called with (bytes done, bytes in all).

    .npy and .npz have no extension dtypes: bfloat16 arrives as "|V2", its bytes unchanged.
    Raises `BuildError`, `AccessDenied`, `ArrayNotFound`, `OptionError`, `UnsupportedDtype`,
    `UnsupportedFormat` (the original cannot be given back), and what reading the snapshot raises.
    When it raises, no file that it wrote is left.
    """
    if format is not None and format not in FORMATS:
        raise OptionError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}, or None")
    target = location_of(destination, "the destination")
    if target == "-":
        raise OptionError("the destination is '-', but files appear whole; `lazymem cat` writes to a pipe")
    if locations.scheme_of(target) is not None:
        raise OptionError(
            f"{locations.display(target)}: is a URL, but `extract` writes local files; "
            "extract to a folder and `lazymem copy` the files there"
        )
    target = locations.local_path(target)
    location = location_of(source)
    opener = _opener(storage_options, cache)
    blob = open_snapshot(location, opener)
    if blob is None:
        what = "is a folder; name a snapshot in it" if opener.is_folder(location) else "is not a snapshot"
        url = locations.display(location)
        raise FormatError(f"{url}: {what}: only snapshots are extracted", url=url)
    with contextlib.closing(blob), contextlib.closing(SnapshotReader(blob, opener)) as reader:
        job = _Job(reader, overwrite, progress)
        try:
            if format is None and names is None and job.index.container is not None:
                _extract_original(job, job.index.container, target)
            elif format == "raw":
                _extract_raw(job, target, names)
            elif format == "npy":
                _extract_npy(job, target, job.names(names))
            elif format == "safetensors":
                _extract_safetensors(job, target, job.names(names))
            else:
                _extract_npz(job, target, job.names(names))
        except BaseException:
            job.undo()
            raise
    return job.written


def cat(
    source: StrPath,
    name: str,
    out: BinaryIO,
    *,
    storage_options: Mapping[str, Any] | None = None,
    cache: Cache = None,
) -> int:
    """Write the bytes of one array, as they lie in memory, to `out`; return their number.

    Those of a view whose elements do not follow one another are written in C order.
    source: the path or URL of a snapshot, whose bytes are checked, or of a container that can be read in
    place. storage_options, cache: as for `extract`. Raises `ArrayNotFound`, `UnsupportedFormat` (it is
    compressed), and what reading and writing raise.
    """
    location = location_of(source)
    opener = _opener(storage_options, cache)
    with contextlib.closing(recognize(location, opener)) as found:
        if isinstance(found, Directory):
            return _cat_in_place(locations.display(location), found, name, out)
        with contextlib.closing(SnapshotReader(found, opener)) as reader:
            (name,) = _names(reader, [name])
            place = reader.index.place_of(name)
            with reader.ahead([(place.offset, place.nbytes)]):
                for piece in _elements(reader, place):
                    out.write(piece)
            return place.size


def _opener(storage_options: Mapping[str, Any] | None, cache: Cache) -> LocationOpener:
    if cache is None and "cache" not in (storage_options or {}):
        cache = False
    return LocationOpener(StoreOptions.from_environment(storage_options, cache=cache))


def _cat_in_place(url: str, directory: Directory, name: str, out: BinaryIO) -> int:
    if name not in directory.names:
        raise _no_array(url, name)
    view = next((view for view in directory.views if view.name == name), None)
    base = name if view is None else view.array
    entry = next(entry for entry in directory.arrays if entry.name == base)
    if entry.compression is not None:
        raise unsupported(
            url, f"array {name!r}", f"is compressed ({entry.compression})", "`lazymem build` a snapshot of it"
        )
    offset, length = entry.offset, entry.nbytes
    if view is not None:
        offset, length = offset + view.offset, view.span
    blob = directory.files[entry.file]
    with contextlib.ExitStack() as stack:
        if blob.fileno() is None:
            blob = stack.enter_context(AheadBlob(blob, [(offset, length)]))
        pieces: Iterator[Any] = (
            blob.read(offset + begin, min(_PIECE, length - begin)) for begin in range(0, length, _PIECE)
        )
        if view is not None and view.order is None:
            pieces = gather(pieces, length, view.dtype, view.shape, view.strides, "C")
        written = 0
        for piece in pieces:
            out.write(piece)
            written += len(piece)
    return written


def _names(reader: SnapshotReader, names: Sequence[str] | None) -> list[str]:
    visible = reader.index.visible
    if names is None:
        return visible
    known = set(visible)
    for name in names:
        if name not in known:
            raise _no_array(reader.index.url, name)
    return list(dict.fromkeys(names))


def _elements(reader: SnapshotReader, place: Place, *, in_c_order: bool = False) -> Iterator[Any]:
    """The bytes of all elements: as they lie where they follow one another, else (or if asked) in C order."""
    stored = reader.read_range(place.offset, place.nbytes)
    if place.strides is None and (place.order == "C" or not in_c_order):
        return stored
    return gather(stored, place.nbytes, place.dtype, place.shape, place.strides, place.order)


def _no_array(url: str, name: str) -> ArrayNotFound:
    return ArrayNotFound(
        f"{url}: has no array {name!r}; `lazymem ls` shows the names it has", url=url, name=name
    )


class _Job:
    """One extraction: where bytes come from, what was written, how far it came."""

    def __init__(self, reader: SnapshotReader, overwrite: bool, progress: Progress | None) -> None:
        self.reader = reader
        self.index = reader.index
        self.written: list[Path] = []
        self.total = 0
        self._done = self._reported = 0
        self._overwrite = overwrite
        self._progress = progress
        self._folders: list[str] = []

    def names(self, names: Sequence[str] | None) -> list[str]:
        found = _names(self.reader, names)
        self.total = sum(self.index.place_of(name).size for name in found)
        return found

    def ahead(self, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Within the block, these arrays are read in this order."""
        places = map(self.index.place_of, names)
        return self.reader.ahead((place.offset, place.nbytes) for place in places)

    def default_name(self, suffix: str) -> str:
        return Path(locations.name_of(self.index.url)).stem + suffix

    def path(self, target: str, name: str) -> str:
        """`target`, or the file `name` in it if it is an existing folder."""
        return os.path.join(target, name) if os.path.isdir(target) else target

    def check_folder(self, target: str, files: int) -> None:
        """Refuse to make a folder that is called like a file for several files."""
        if files > 1 and target.lower().endswith(_FILE_SUFFIXES) and not os.path.lexists(target):
            raise OptionError(
                f"{target}: is called like a file, but {files} files would be written; name a folder, or "
                'take the arrays as one file (format="safetensors" or "npz", `--format` on the command line)'
            )

    def path_below(self, folder: str, name: str) -> str:
        """The path of `name`, which comes from the snapshot, in `folder`; makes the folders to it."""
        why = unsafe_name(name)
        if why is not None:
            raise FormatError(
                f"{self.index.url}: the name {name[:200]!r} {why}, so it cannot be the name of a file; "
                'take the bytes with format="raw" or `lazymem cat`',
                url=self.index.url,
                field=name,
            )
        self._make_folder(folder)
        *parents, _ = name.split("/")
        path = os.path.join(folder, name)
        for depth in range(1, len(parents) + 1):
            below = os.path.join(folder, *parents[:depth])
            self._refuse_link(below, folder)
            self._make_folder(below)
        self._refuse_link(path, folder)
        return path

    def _refuse_link(self, path: str, folder: str) -> None:
        if os.path.islink(path):
            raise BuildError(f"{path}: is a link that may lead out of {folder}; remove it")

    def _make_folder(self, path: str) -> None:
        if os.path.isdir(path):
            return
        try:
            os.mkdir(path)
        except FileExistsError:
            raise BuildError(f"{path}: exists and is not a folder; choose another destination") from None
        except OSError as error:
            raise BuildError(f"{path}: cannot be made a folder ({error.strerror}); check the path") from error
        self._folders.append(path)

    @contextlib.contextmanager
    def file(self, path: str) -> Iterator[BinaryIO]:
        with AtomicFile(path, self._overwrite) as target:
            yield target.file
        self.written.append(Path(path))

    def copy(self, name: str, write: Callable[[Any], object], *, in_c_order: bool = False) -> None:
        for piece in _elements(self.reader, self.index.place_of(name), in_c_order=in_c_order):
            write(piece)
            self.advance(len(piece))

    def advance(self, length: int) -> None:
        self._done += length
        if self._progress and (self._done - self._reported >= _PROGRESS_STEP or self._done == self.total):
            self._reported = self._done
            self._progress(self._done, self.total)

    def undo(self) -> None:
        """Remove what was written, and the folders made for it."""
        for path in self.written:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(path))
        for folder in reversed(self._folders):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


# ---- the original container ----


def _extract_original(job: _Job, origin: Origin, target: str) -> None:
    url = job.index.url
    if not origin.exact:
        reason = origin.reason or "no reason is recorded"
        raise UnsupportedFormat(
            f"{url}: its {origin.format} original cannot be given back ({reason}); "
            'extract the arrays with format="npz"',
            url=url,
            field="section CONT",
        )
    job.total = sum(file.size for file in origin.files)
    if len(origin.files) == 1 and not os.path.isdir(target):
        _extract_file(job, 0, origin.files[0], target)
        return
    job.check_folder(target, len(origin.files))
    for number, file in enumerate(origin.files):
        _extract_file(job, number, file, job.path_below(target, file.name))


def _extract_file(job: _Job, number: int, file: OriginFile, path: str) -> None:
    extents = job.index.extents
    own = extents[slice(*np.searchsorted(extents["file"], [number, number + 1]))]
    columns = [own[name].tolist() for name in ("file_offset", "content_offset", "length")]
    # Both are sorted by where they go. A plain part is where it comes from and its length.
    plain = ((where, (offset, length)) for where, offset, length in zip(*columns, strict=True))
    members = sorted(((member.file_offset, member) for member in file.deflated), key=_first)
    parts: list[tuple[int, tuple[int, int] | DeflatedMember]]
    parts = list(heapq.merge(plain, members, key=_first))
    digest = None if file.sha256 is None else hashlib.sha256()
    with job.file(path) as out, job.reader.ahead(_content_ranges(parts)):
        for _, part in parts:
            if isinstance(part, DeflatedMember):
                _copy_deflated(job, file, part, out, digest)
            else:
                _copy_plain(job, *part, out, digest)
        if digest is not None and digest.hexdigest() != file.sha256:
            raise _differs(job, file, "has another SHA-256 than the original")


def _content_ranges(
    parts: Iterable[tuple[int, tuple[int, int] | DeflatedMember]],
) -> Iterator[tuple[int, int]]:
    for _, part in parts:
        yield from part.extents if isinstance(part, DeflatedMember) else (part,)


def _first(part: tuple[int, Any]) -> int:
    return part[0]


def _copy_plain(job: _Job, offset: int, length: int, out: BinaryIO, digest: Any) -> None:
    for segment in job.reader.segments(offset, length):
        hole = segment.chunk is None and segment.length >= _MIN_HOLE
        if hole:
            out.seek(segment.length - 1, os.SEEK_CUR)
            out.write(b"\0")  # or a file that ends in a hole would end before it
        if hole and digest is None:
            job.advance(segment.length)
            continue
        for piece in job.reader.read_segment(segment):
            if digest is not None:
                digest.update(piece)
            if not hole:
                out.write(piece)
            job.advance(len(piece))


def _copy_deflated(job: _Job, file: OriginFile, member: DeflatedMember, out: BinaryIO, digest: Any) -> None:
    deflater = zlib.compressobj(member.level, zlib.DEFLATED, -zlib.MAX_WBITS)
    left = member.stored_length
    where = f"has a member at byte {member.file_offset} that deflates to"

    def write(data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise _differs(job, file, f"{where} more bytes")
        out.write(data)
        if digest is not None:
            digest.update(data)
        job.advance(len(data))

    for offset, length in member.extents:
        for piece in job.reader.read_range(offset, length):
            write(deflater.compress(piece))
    write(deflater.flush())
    if left:
        raise _differs(job, file, f"{where} fewer bytes")


def _differs(job: _Job, file: OriginFile, what: str) -> FormatError:
    cause = "the snapshot is damaged"
    if file.deflated:
        cause += f", or zlib {zlib.ZLIB_RUNTIME_VERSION} deflates otherwise than the builder's"
    return FormatError(
        f"{job.index.url}: {file.name!r}, put together again, {what}; {cause}: "
        'run `lazymem verify`, or extract the arrays with format="npz"',
        url=job.index.url,
        field=file.name,
    )


# ---- other formats ----


def _extract_raw(job: _Job, target: str, names: Sequence[str] | None) -> None:
    if names is not None and len(names) != 1:
        raise OptionError(f"format 'raw' writes one array or the whole content, not {len(names)} arrays")
    path = job.path(target, job.default_name(".bin"))
    if names is not None:
        (name,) = job.names(names)
        with job.file(path) as out, job.ahead([name]):
            job.copy(name, out.write)
        return
    job.total = job.index.content_size
    with job.file(path) as out, job.reader.ahead([(0, job.total)]):
        _copy_plain(job, 0, job.total, out, None)


def _extract_npy(job: _Job, target: str, names: list[str]) -> None:
    paths = [job.path(target, job.default_name(".npy"))]
    if len(names) != 1:
        job.check_folder(target, len(names))
        paths = [job.path_below(target, name + ".npy") for name in names]
    with job.ahead(names):
        for name, path in zip(names, paths, strict=True):
            header = _npy_header(job, name)
            with job.file(path) as out:
                out.write(header)
                job.copy(name, out.write)


def _npy_header(job: _Job, name: str) -> bytes:
    place = job.index.place_of(name)
    return npy.make_header(place.dtype, place.shape, place.order, name=name)


def _extract_npz(job: _Job, target: str, names: list[str]) -> None:
    index = job.index
    members = [name + ".npy" for name in names]
    for member in members:
        # Other programs unpack an .npz to the names in it.
        why = unsafe_name(member) or (len(member.encode()) > _MAX_ZIP_NAME and "is too long for a zip file")
        if why:
            raise FormatError(
                f"{index.url}: the array name {member[:200]!r} {why}; "
                'extract with format="safetensors", or "raw" for one array',
                url=index.url,
                field=member,
            )
    headers = [_npy_header(job, name) for name in names]
    with (
        job.file(job.path(target, job.default_name(".npz"))) as out,
        zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        job.ahead(names),
    ):
        for name, member, header in zip(names, members, headers, strict=True):
            # A ZipInfo has a fixed time, so the same snapshot gives the same file.
            with archive.open(zipfile.ZipInfo(member), "w", force_zip64=True) as stream:
                stream.write(header)
                job.copy(name, stream.write)


def _extract_safetensors(job: _Job, target: str, names: list[str]) -> None:
    index = job.index
    tensors: list[tuple[str, str, list[int], int]] = []
    # Widest first, as the safetensors package does, so that every tensor is aligned.
    names = sorted(names, key=lambda name: -index.place_of(name).dtype.itemsize)
    for name in names:
        place = index.place_of(name)
        found = safetensors.dtype_name(place.dtype, place.shape, index.array_metadata.get(name, {}))
        if found is None:
            raise UnsupportedDtype(
                f"{index.url}: array {name!r} has dtype {str(place.dtype)[:200]}, which safetensors "
                'does not have; extract it with format="npz"'
            )
        tensors.append((name, *found, place.size))
    header = safetensors.make_header(
        tensors,
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in index.metadata.items()
        },
    )
    with job.file(job.path(target, job.default_name(".safetensors"))) as out, job.ahead(names):
        out.write(header)
        for name in names:
            job.copy(name, out.write, in_c_order=True)
