# SPDX-License-Identifier: Apache-2.0
"""The contract of a store: bytes by URL and range. Knows nothing of chunks.

A `Blob` is one opened object: its size and identity were taken once, at open, and every read is of
that version or raises `SnapshotChanged`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Blob(Protocol):
    """One immutable object, opened for reading ranges. Threads may share it."""

    @property
    def url(self) -> str:
        """Where it lies, as the user would write it; free of secrets."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def identity(self) -> str:
        """Differs when the content was replaced: device, inode, size and time; later, an ETag."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Blocks. Raises `ReadError` if they are not there."""

    def has_changed(self) -> bool:
        """Whether the object is known to be another version by now than the one that was opened."""

    def fileno(self) -> int | None:
        """A descriptor that pread(2) works on, or None. The blob keeps owning it."""

    def close(self) -> None:
        """Idempotent."""
