# SPDX-License-Identifier: Apache-2.0
"""`populate`: what an array shows, into memory, wherever the array comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from .extents import Extent, extents_of
from .memory import Lease, find

T = TypeVar("T")


def populate(what: T) -> T:
    """Populate what an array, tensor or buffer shows, and return it: `file.write(lazymem.populate(array))`.

    what: anything in lazy memory, a view or a slice of it too, of which only the chunks that it shows are
        populated; or a mapping, list or tuple of such (`torch.save(lazymem.populate(tensors), path)`), what
        else is in there being left alone. Memory that is not lazy is there already.

    After it system calls work on the memory with every backend, and no touch of it fails, until the
    snapshot or the application gives pages back. Pages the application gave back (`madvise`) come again.
    Blocks with the GIL released; Ctrl-C is noticed. Raises what `Snapshot.prefetch(wait=True)` raises, and
    `TypeError` for what has no memory to populate, and for an array of objects, which shows addresses.
    """
    if isinstance(what, np.ndarray) and what.dtype.hasobject:
        raise TypeError(
            "an array of objects shows their addresses, not the memory of what is in it; give what is in it, "
            "or a list of that"
        )
    if extents_of(what) is None and not isinstance(what, (Mapping, list, tuple)):
        raise TypeError(
            f"{type(what).__name__} shows no memory; give an array, a tensor, a buffer, or a mapping, list "
            "or tuple of them"
        )
    wanted: dict[int, tuple[Lease, list[Extent]]] = {}
    for extents in _all_extents(what):
        lease = find(extents[0][0]) if extents else None
        if lease is not None:  # all of an array lies in one region
            _, inside = wanted.setdefault(id(lease), (lease, []))
            inside += [(begin - lease.address, end - lease.address) for begin, end in extents]
    for lease, inside in wanted.values():
        lease.populate(inside)
    return what


def _all_extents(what: Any) -> Iterator[list[Extent]]:
    """Of whatever it holds, at any depth; of what holds itself, once."""
    seen: dict[int, Any] = {}  # the objects too: what a mapping makes anew might get the number of a dead one
    waiting = [what]
    while waiting:
        each = waiting.pop()
        extents = extents_of(each)
        if extents is not None:
            yield extents
        elif isinstance(each, (Mapping, list, tuple)) and id(each) not in seen:
            seen[id(each)] = each
            waiting += each.values() if isinstance(each, Mapping) else each
