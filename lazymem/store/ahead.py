# SPDX-License-Identifier: Apache-2.0
"""Reading a blob in a known order, several ranges at a time, ahead of who takes them.

For whole-file work on remote objects, where each request costs a round trip. Owns its threads; the blob
stays the caller's. Reading a range that nobody announced is right, only not ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, NamedTuple

from .base import Blob

#: Bytes of one request. On a store 30 ms away, sixteen of these at a time fill a 10 Gbit/s line.
PIECE: Final = 4 << 20
#: Requests at a time, and pieces in memory; the fetcher may make fewer.
PIECES: Final = 16


class _Piece(NamedTuple):
    begin: int
    end: int
    buffer: memoryview
    arrival: Future[None]


class AheadBlob:
    """`blob`, whose `ranges` (offset, length) will be read in this order, front to back.

        with AheadBlob(blob, [(0, blob.size)]) as ahead:
            ahead.read(0, 100); ahead.read(100, 5_000_000)

    A `Blob` itself, for one thread. Ranges that follow one another become one request. A read may take any
    part of them, as long as it goes on in their order; others go to `blob`. Memory: `PIECES` pieces, and
    what is read. A block that ends by an exception, such as Ctrl-C, closes `blob`.
    """

    def __init__(self, blob: Blob, ranges: Iterable[tuple[int, int]]) -> None:
        self._blob = blob
        self._plan = _cut(ranges)
        self._pool = ThreadPoolExecutor(PIECES, "lazymem-ahead")
        self._pieces: deque[_Piece] = deque()
        # Used again and again: left to the threads' own allocations, memory grows to several times as much.
        self._free: list[memoryview] = []

    @property
    def url(self) -> str:
        return self._blob.url

    @property
    def size(self) -> int:
        return self._blob.size

    @property
    def identity(self) -> str:
        return self._blob.identity

    def has_changed(self) -> bool:
        return self._blob.has_changed()

    def fileno(self) -> None:
        """None: who reads the descriptor would not profit."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Blocks. Raises what the blob raises."""
        parts: list[bytes] = []
        position, end = offset, offset + length
        while position < end:
            piece = self._advance(position)
            if piece is None:
                parts.append(self._blob.read(position, end - position))
                break
            piece.arrival.result()
            stop = min(end, piece.end)
            parts.append(bytes(piece.buffer[position - piece.begin : stop - piece.begin]))
            position = stop
            if stop == piece.end:
                self._drop()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def _advance(self, position: int) -> _Piece | None:
        """Ask for what comes next; drop the pieces before the one that holds `position`, and return it."""
        self._fill()
        for passed, piece in enumerate(self._pieces):
            if piece.begin <= position < piece.end:
                for _ in range(passed):
                    self._drop()
                self._fill()
                return piece
        return None

    def _drop(self) -> None:
        """Forget the first piece."""
        piece = self._pieces.popleft()
        if piece.arrival.cancel() or piece.arrival.done():
            self._free.append(piece.buffer)  # else it is being written to

    def _fill(self) -> None:
        while len(self._pieces) < PIECES:
            following = next(self._plan, None)
            if following is None:
                return
            begin, end = following
            buffer = self._free.pop() if self._free else memoryview(bytearray(PIECE))
            arrival = self._pool.submit(self._blob.read_into, begin, buffer[: end - begin])
            self._pieces.append(_Piece(begin, end, buffer, arrival))

    def close(self) -> None:
        """Wait for the requests that are under way; make no others. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pieces.clear()
        self._free.clear()
        self._plan = iter(())

    def __enter__(self) -> AheadBlob:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self._blob.close()  # so that nobody waits for a store that is silent
        self.close()


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges as (begin, end) of at most `PIECE` bytes, neighbours joined."""
    begin = end = 0
    for offset, length in ranges:
        if offset != end:
            if begin < end:
                yield begin, end
            begin = offset
        end = offset + length
        while end - begin >= PIECE:
            yield begin, begin + PIECE
            begin += PIECE
    if begin < end:
        yield begin, end
