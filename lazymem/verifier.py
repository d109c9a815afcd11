# SPDX-License-Identifier: Apache-2.0
"""`verify`: check every chunk of a snapshot against its checksums, and the whole against its digest.

Goes on past damage, so that the report is complete. Reads the file once, in parallel.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from . import _native
from .errors import ChunkCorrupt, FormatError, ReadError
from .format import structs
from .format.index import content_digest, parse_head
from .format.reader import SnapshotReader, open_snapshot
from .options import check_threads, cpu_count

#: Records per task: fewer tasks than records, and still an even share for each thread.
_BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class BadChunk:
    """A damaged chunk. offset and length: of its stored bytes. arrays: those with bytes in it."""

    chunk: int
    offset: int
    length: int
    arrays: tuple[str, ...]
    reason: str


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
    progress: Callable[[int, int | None], None] | None = None,
) -> VerifyReport:
    """Check all of a snapshot, and report every damaged chunk.

    deep: decode every chunk and compare its SHA-256 too; without it only the checksums of the stored
    bytes. progress: called with (chunks checked, chunks in all). Blocks until all is read. Raises
    `FormatError` if `source` is no snapshot or its index is damaged, and what opening a file raises.
    """
    started = time.monotonic()
    workers = cpu_count() if threads is None else check_threads(threads)
    path = os.fspath(source)
    blob = open_snapshot(path)
    if blob is None:
        what = "is not a snapshot, and other formats carry no checksums to verify"
        if os.path.isdir(path):
            what = "is a folder, and one file is verified at a time; name it"
        raise FormatError(f"{path}: {what}; `lazymem build` makes a snapshot that carries them", url=path)
    with blob:
        return _Verification(SnapshotReader(blob), deep).run(workers, progress, started)


class _Damaged(Exception):
    """What is wrong with one chunk, without saying which."""


class _Verification:
    def __init__(self, reader: SnapshotReader, deep: bool) -> None:
        self._reader = reader
        self._index = reader.index
        self._deep = deep
        self._problems: list[str] = []
        self._digests: bytes | None = None

    def run(
        self, threads: int, progress: Callable[[int, int | None], None] | None, started: float
    ) -> VerifyReport:
        index = self._index
        try:
            self._digests = self._reader.chunk_digests()
        except (FormatError, ReadError) as error:
            self._problems.append(str(error))
        self._check_head()
        bad: list[BadChunk] = []
        found = bytearray()  # SHA-256 of what the chunks really hold; complete if none is bad
        done = 0
        with ThreadPoolExecutor(threads, "lazymem-verify") as pool:
            pending: deque[Future[tuple[int, bytes, list[BadChunk]]]] = deque()
            try:
                for first_chunk, first_record, count in _batches(self._reader):
                    pending.append(pool.submit(self._check, first_chunk, first_record, count))
                    # Bounds memory where the file has millions of chunks.
                    while len(pending) > 4 * threads:
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
        except (FormatError, ReadError) as error:
            self._problems.append(str(error))
            return
        if head["chunk_size"] != index.chunk_size or head["incompatible"] & ~structs.KNOWN_INCOMPATIBLE:
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

    def _check(self, first_chunk: int, first_record: int, count: int) -> tuple[int, bytes, list[BadChunk]]:
        """Check `count` consecutive chunks: (count, SHA-256 of the good ones if deep, the bad ones)."""
        found = bytearray()
        bad = []
        for i in range(count):
            chunk, record = first_chunk + i, first_record + i
            try:
                found += self._check_one(chunk, record)
            except (ChunkCorrupt, ReadError, _Damaged) as error:
                row = self._index.records[record]
                arrays = tuple(self._reader.chunk_arrays(chunk))
                cause = str(error.__cause__ or error)  # the error itself names the chunk once more
                bad.append(BadChunk(chunk, int(row["offset"]), int(row["stored_length"]), arrays, cause))
        return count, bytes(found), bad

    def _check_one(self, chunk: int, record: int) -> bytes:
        index = self._index
        stored = self._reader.read_stored(record)
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
    """(first chunk, first record, count) of at most _BATCH stored chunks each, in order."""
    for run in reader.index.runs:
        first_chunk, count, first_record = (int(value) for value in run.tolist())
        if first_record == structs.ZERO_RUN:
            continue
        for i in range(0, count, _BATCH):
            yield first_chunk + i, first_record + i, min(_BATCH, count - i)


def _collect(
    pending: deque[Future[tuple[int, bytes, list[BadChunk]]]], found: bytearray, bad: list[BadChunk]
) -> int:
    count, digests, damaged = pending.popleft().result()
    found += digests
    bad += damaged
    return count
