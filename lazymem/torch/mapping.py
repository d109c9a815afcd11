# SPDX-License-Identifier: Apache-2.0
"""A snapshot as a mapping of names to torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import UnsupportedDtype
from ..progress import Progress
from ..snapshot import Snapshot
from .tensors import tensor_of


class Tensors(Mapping[str, torch.Tensor]):
    """The arrays of `snapshot`, open copy-on-write, as tensors: for whatever takes a state_dict.

    Looking a tensor up reads nothing. Two look-ups show the same memory. A touch whose bytes cannot be had
    ends in SIGBUS, after a line on stderr that says why; `prefetch` raises instead. Pickles by reference. A
    context manager: leaving the block closes the snapshot.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises `ArrayNotFound`, a KeyError; `UnsupportedDtype` for what torch has no dtype for."""
        array = self.snapshot[name]
        try:
            return tensor_of(array, self.snapshot.info(name).metadata)
        except UnsupportedDtype as error:
            raise UnsupportedDtype(f"{self.snapshot.url}: array {name!r}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.snapshot)

    def __len__(self) -> int:
        return len(self.snapshot)

    def __contains__(self, name: object) -> bool:
        return name in self.snapshot

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The user's metadata of the snapshot, or of the file read in place."""
        return self.snapshot.metadata

    def prefetch(
        self,
        names: str | Iterable[str] | None = None,
        *,
        wait: bool = False,
        order: str = "given",
        progress: Progress | bool | None = None,
    ) -> None:
        """Populate tensors before they are touched; see `Snapshot.prefetch`."""
        self.snapshot.prefetch(names, wait=wait, order=order, progress=progress)

    def close(self) -> None:
        """Give the memory back. Raises `BufferError` while tensors are alive."""
        self.snapshot.close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.snapshot.__exit__(kind, *exc)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tensors, (self.snapshot,)

    def __repr__(self) -> str:
        return f"<lazymem.torch.Tensors of {self.snapshot!r}>"
