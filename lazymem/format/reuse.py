# SPDX-License-Identifier: Apache-2.0
"""The chunks that a layer need not store, because a base has them: found by SHA-256, wherever they lie."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, OptionError
from . import structs
from .bases import describe
from .index import content_digest
from .layers import Base, name_for
from .reader import SnapshotReader

_DIGEST: Final = np.dtype([("key", "<u8"), ("rest", "V24")])


class BaseChunks:
    """The stored chunks of a base, its own and those of its bases, by the SHA-256 of their bytes.

    layer: where the layer will lie, by which the bases are named. Threads may share it. Memory: 80 bytes a
    chunk. Raises `OptionError` where the layer cannot name them, and `FormatError`.
    """

    def __init__(self, reader: SnapshotReader, layer: str) -> None:
        index = reader.index
        if len(index.sources) >= structs.MAX_BASES:
            raise OptionError(
                f"{index.url}: stands on {len(index.sources)} files, and a layer may on {structs.MAX_BASES}; "
                "build it anew without --base, and layers on that"
            )
        digests = reader.chunk_digests()
        if digests is None or index.digest != content_digest(
            index.chunk_size, index.content_size, index.runs, digests, index.sections
        ):
            raise FormatError(
                f"{index.url}: section CDIG is missing or does not match the digest, so its chunks cannot be "
                "told apart; build it anew",
                url=index.url,
                field="section CDIG",
            )
        self.chunk_size = index.chunk_size
        self.bases = [describe(name_for(layer, blob.url), blob) for blob in (reader.blob, *reader.bases)]
        self._records = index.records.copy()
        self._records["source"] += 1
        found = np.frombuffer(digests, _DIGEST)
        self._order = found["key"].argsort(kind="stable")
        self._keys = found["key"][self._order]
        self._digests = digests

    def find(self, digest: bytes) -> bytes | None:
        """The record of a chunk with this SHA-256, or None."""
        key = np.frombuffer(digest, "<u8", 1)[0]
        at, size = int(self._keys.searchsorted(key)), structs.DIGEST_SIZE
        while at < len(self._keys) and self._keys[at] == key:
            record = int(self._order[at])
            if self._digests[record * size : (record + 1) * size] == digest:
                return bytes(self._records[record].tobytes())
            at += 1
        return None

    def settle(self, records: NDArray[np.void]) -> list[Base]:
        """The bases that these records need; they name them by their places in that list from now on.

        The first is always among them: that the file is a layer stood in its head before its first chunk.
        """
        used = np.bincount(records["source"], minlength=len(self.bases) + 1) > 0
        used[1] = True
        used[0] = False
        numbers = np.cumsum(used) * used
        records["source"] = numbers[records["source"]]
        return [base for base, is_used in zip(self.bases, used[1:].tolist(), strict=True) if is_used]
