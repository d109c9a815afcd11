# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie in the content. Owns the placement rules; reads and writes nothing.

Placement goes in source order and never looks ahead, so that a stream of arrays whose number is not
known can be laid out in one pass. What lies between two arrays is zeros: whole chunks of it cost no
bytes in the file, and the rest compresses away.

- An array of a chunk or more starts on a chunk boundary, so no chunk holds two of them.
- An array of 2 MiB or more starts on a 2 MiB boundary too, so that huge pages can be moved in.
- From 4096 bytes on an array starts on a page; smaller ones are packed at 64 bytes (a cache line,
  and more than any dtype's alignment).
- An array may ask for a *phase*: it then starts that many bytes, fewer than 64, after where it would start
  else. Arrays of a safetensors file keep their file's: some libraries' sums come out different in the last
  bit when a vector begins in the middle of 16 bytes (MKL's product of a matrix and one row, measured), and
  a model shall give the same answers from its snapshot as from its file. Of a big array then the last few
  bytes may lie in the chunk that the next one begins in.
- An array of at most an eighth of a chunk never straddles two chunks: one touch, one chunk, for at
  most an eighth of a chunk wasted.
"""

from __future__ import annotations

from typing import Final

HUGE_PAGE: Final = 2 << 20
PAGE: Final = 4096
SMALL_ALIGNMENT: Final = 64
UNSPLIT_FRACTION: Final = 8


def align_up(offset: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `offset`."""
    return (offset + alignment - 1) & ~(alignment - 1)


def alignment_of(nbytes: int, chunk_size: int) -> int:
    """What the offset of an array of `nbytes` bytes is a multiple of."""
    alignment = SMALL_ALIGNMENT if nbytes < PAGE else PAGE
    if nbytes >= chunk_size:
        alignment = chunk_size
    if nbytes >= HUGE_PAGE:
        alignment = max(alignment, HUGE_PAGE)
    return alignment


def place(cursor: int, nbytes: int, chunk_size: int, phase: int = 0) -> int:
    """Content offset of the next array, where all arrays so far end at or before `cursor`."""
    if nbytes == 0:
        return cursor
    start = max(0, cursor - phase)
    offset = align_up(start, alignment_of(nbytes, chunk_size)) + phase
    straddles = offset // chunk_size != (offset + nbytes - 1) // chunk_size
    if straddles and nbytes <= chunk_size // UNSPLIT_FRACTION:
        offset = align_up(start, chunk_size) + phase
    return offset
