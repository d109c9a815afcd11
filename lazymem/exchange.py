# SPDX-License-Identifier: Apache-2.0
"""Replacing what names mean, in all modules that are imported.

Names of lazymem's own are left alone, so that what was imported from here on purpose stays; but for modules
that keep what they replaced themselves, and so must hear of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

#: Held while a name is replaced. Who replaces one and restores it later holds it for each of both, and is in
#: `_FOLLOWING`: else one of two that overlap restores what the other has taken away meanwhile. Nothing is
#: imported, and no other lock taken, while it is held.
lock = threading.RLock()

_FOLLOWING: Final = frozenset({"lazymem.transformers.redirection"})


def exchange(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Replace each name that means the first of a pair by the second.

    safetensors' own names come first, so that a module that is imported meanwhile gets the new ones.
    """
    by_identity = {id(old): new for old, new in pairs}  # the pairs keep the old ones alive
    with lock:
        modules = sorted(dict(sys.modules).items(), key=lambda item: not item[0].startswith("safetensors"))
        for name, module in modules:
            names = getattr(module, "__dict__", None)
            if not isinstance(names, dict) or (_is_ours(name) and name not in _FOLLOWING):
                continue
            for key, value in list(names.items()):
                if id(value) in by_identity:
                    names[key] = by_identity[id(value)]


def _is_ours(name: str) -> bool:
    return name == "lazymem" or name.startswith("lazymem.")
