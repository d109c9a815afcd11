# SPDX-License-Identifier: Apache-2.0
"""`verify`: check every chunk of a snapshot against its checksums, and the whole against its digest.

Goes on past damage, so that the report is complete. Reads the file once: a local one in parallel, a remote
one ahead of the checks. A store that does not deliver is no damage, and ends it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from . import _native
from .errors import ChunkCorrupt, FormatError, ReadError
from .format import structs
from .format.index import content_digest, parse_head
from .format.reader import SnapshotReader, open_snapshot
from .opener import LocationOpener, location_of
from .options import StoreOptions, check_threads, cpu_count
from .store import locations

#: Records per task: fewer tasks than records, and still an even share for each thread.
_BATCH: Final = 8
#: But no more bytes of content than this: a task on a remote snapshot holds its stored bytes.
_BATCH_BYTES: Final = 8 << 20
#: Tasks that wait, beside those at work: bounds memory where the file has millions of chunks.
_WAITING: Final = 8


@dataclass(frozen=True, slots=True)
class BadChunk:
    """A damaged chunk. offset and length: of its stored bytes. arrays: those with bytes in it.

    base: of a layer's chunk, the file that holds these bytes; None: the layer itself.
    """

    chunk: int
    offset: int
    length: int
    arrays: tuple[str, ...]
    reason: str
    base: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found. Sizes in bytes.

    digest: hexadecimal, as the file states it. digest_ok: the chunks' SHA-256 and the index add up to
        it; False also where a chunk is bad; None where a shallow check had no SHA-256 to go by.
    problems: a sentence for each damage that is not a chunk's, such as the head's, at which opening
        never looks.
    """

    url: str
    deep: bool
    chunks: int
    stored_chunks: int
    content_bytes: int
    file_bytes: int
    bad: tuple[BadChunk, ...]
    digest: str
    digest_ok: bool | None
    problems: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.bad and not self.problems


def verify(
    source: str | os.PathLike[str],
    *,
    threads: int | None = None,
    deep: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | bool | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> VerifyReport:
    """Check all of a snapshot, and report every damaged chunk.

    source: a path or URL; of a layer, the chunks that it uses of its bases are checked, too.
    deep: decode every chunk and compare its SHA-256 too; without it only the checksums of the stored bytes.
    storage_options: as for `open`. cache: as for `open`, but None is none whatever the environment says,
    since it is the store's own bytes that are in question.
    progress: called with (chunks checked, chunks in all). Blocks until all is read. Raises `FormatError`
    if `source` is no snapshot or its index is damaged, what opening a file raises, and `ReadError` if a
    remote store does not deliver.
    """
    started = time.monotonic()
    workers = cpu_count() if threads is None else check_threads(threads)
    location = location_of(source)
    store_options = StoreOptions.from_environment(storage_options, cache=False if cache is None else cache)
    opener = LocationOpener(store_options)
    blob = open_snapshot(location, opener)
    if blob is None:
        what = "is not a snapshot, and other formats carry no checksums to verify"
        if opener.is_folder(location):
            what = "is a folder, and one file is verified at a time; name it"
        url = locations.display(location)
        raise FormatError(f"{url}: {what}; `lazymem build` makes a snapshot that carries them", url=url)
    with closing(blob), closing(SnapshotReader(blob, opener)) as reader:
        return _Verification(reader, deep).run(workers, progress, started)


class _Damaged(Exception):
    """What is wrong with one chunk, without saying which."""


class _Verification:
    def __init__(self, reader: SnapshotReader, deep: bool) -> None:
        self._reader = reader
        self._index = reader.index
        self._deep = deep
        # A local file that cannot be read is damaged; of a remote one that says nothing.
        self._remote = reader.blob.fileno() is None
        self._unreadable = (FormatError,) if self._remote else (FormatError, ReadError)
        self._problems: list[str] = []
        self._digests: bytes | None = None

    def run(
        self, threads: int, progress: Callable[[int, int | None], None] | None, started: float
    ) -> VerifyReport:
        index = self._index
        try:
            self._digests = self._reader.chunk_digests()
        except self._unreadable as error:
            self._problems.append(str(error))
        self._check_head()
        bad: list[BadChunk] = []
        found = bytearray()  # SHA-256 of what the chunks really hold; complete if none is bad
        done = 0
        with (
            self._reader.ahead([(0, index.content_size)]),
            ThreadPoolExecutor(threads, "lazymem-verify") as pool,
        ):
            pending: deque[Future[tuple[int, bytes, list[BadChunk]]]] = deque()
            try:
                for first_chunk, first_record, count in _batches(self._reader):
                    stored = None
                    if self._remote:
                        stored = [self._reader.read_stored(first_record + i) for i in range(count)]
                    pending.append(pool.submit(self._check, first_chunk, first_record, count, stored))
                    while len(pending) > threads + _WAITING:
                        done += _collect(pending, found, bad)
                        if progress is not None:
                            progress(done, len(index.records))
                while pending:
                    done += _collect(pending, found, bad)
                    if progress is not None:
                        progress(done, len(index.records))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return VerifyReport(
            url=index.url,
            deep=self._deep,
            chunks=index.chunk_count,
            stored_chunks=len(index.records),
            content_bytes=index.content_size,
            file_bytes=index.file_size,
            bad=tuple(bad),
            digest=index.digest.hex(),
            digest_ok=False if bad else self._check_digest(bytes(found)),
            problems=tuple(self._problems),
            seconds=time.monotonic() - started,
        )

    def _check_head(self) -> None:
        index = self._index
        try:
            head = parse_head(index.url, self._reader.blob.read(0, structs.HEAD.size))
        except self._unreadable as error:
            self._problems.append(str(error))
            return
        features = structs.LAYERS if index.sources else 0
        if head["chunk_size"] != index.chunk_size or head["incompatible"] != features:
            self._problems.append(f"{index.url}: the head disagrees with the tail; build the snapshot anew")

    def _check_digest(self, found: bytes) -> bool | None:
        index = self._index
        digests = found if self._deep else self._digests
        if digests is None:
            return None
        total = content_digest(index.chunk_size, index.content_size, index.runs, digests, index.sections)
        if total != index.digest:
            self._problems.append(
                f"{index.url}: the content does not match the digest {index.digest.hex()}; build it anew"
            )
        return total == index.digest

    def _check(
        self, first_chunk: int, first_record: int, count: int, stored: list[bytes] | None
    ) -> tuple[int, bytes, list[BadChunk]]:
        """Check `count` consecutive chunks: (count, SHA-256 of the good ones if deep, the bad ones).

        stored: their bytes, if they were read already.
        """
        found = bytearray()
        bad = []
        for i in range(count):
            chunk, record = first_chunk + i, first_record + i
            try:
                data = self._reader.read_stored(record) if stored is None else stored[i]
                found += self._check_one(chunk, record, data)
            except (ChunkCorrupt, ReadError, _Damaged) as error:
                row = self._index.records[record]
                arrays = tuple(self._reader.chunk_arrays(chunk))
                cause = str(error.__cause__ or error)  # the error itself names the chunk once more
                place = int(row["offset"]), int(row["stored_length"])
                bad.append(BadChunk(chunk, *place, arrays, cause, self._reader.base_of(record)))
        return count, bytes(found), bad

    def _check_one(self, chunk: int, record: int, stored: bytes) -> bytes:
        index = self._index
        if not self._deep:
            if _native.checksum(stored) != int(index.records["checksum"][record]):
                raise _Damaged("the stored bytes do not match their checksum")
            return b""
        digest = hashlib.sha256(self._reader.decode(chunk, record, stored)).digest()
        size = structs.DIGEST_SIZE
        if self._digests is not None and digest != self._digests[record * size : (record + 1) * size]:
            raise _Damaged("the chunk decodes to bytes of another SHA-256")
        return digest


def _batches(reader: SnapshotReader) -> Iterator[tuple[int, int, int]]:
    """(first chunk, first record, count) of a task's stored chunks each, in order."""
    batch = max(1, min(_BATCH, _BATCH_BYTES // reader.index.chunk_size))
    for run in reader.index.runs:
        first_chunk, count, first_record = (int(value) for value in run.tolist())
        if first_record == structs.ZERO_RUN:
            continue
        for i in range(0, count, batch):
            yield first_chunk + i, first_record + i, min(batch, count - i)


def _collect(
    pending: deque[Future[tuple[int, bytes, list[BadChunk]]]], found: bytearray, bad: list[BadChunk]
) -> int:
    count, digests, damaged = pending.popleft().result()
    found += digests
    bad += damaged
    return count
