# SPDX-License-Identifier: Apache-2.0
"""`install`: code that imports safetensors gets lazymem's functions, until `uninstall`.

What is put in place are the stand-ins of `stand_ins`. Names are replaced in the package and in every module
that is imported; objects that hold a function elsewhere (a closure, a `functools.partial`) keep it.
"""

from __future__ import annotations

import importlib.util
import threading
from types import TracebackType
from typing import Any

from ..exchange import exchange
from . import opening, package, stand_ins
from .routing import Routing

_lock = threading.RLock()
_installed: _Replacement | None = None
_depth = 0


class Installation:
    """One `install()`; leaving its `with` block, or `uninstall`, takes it back. The last one restores all."""

    def __init__(self, replacement: _Replacement) -> None:
        self._replacement = replacement
        self._active = True

    @property
    def opened(self) -> tuple[str, ...]:
        """Files that lazymem.safetensors has opened since it was installed, in order."""
        return tuple(self._replacement.opened)

    def uninstall(self) -> None:
        """Idempotent."""
        with _lock:
            if self._active:
                self._active = False
                _leave()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install() -> Installation:
    """Put lazymem in place of what reads in `safetensors`, `.torch`, `.numpy`, and in modules that took it.

    `s3://`, `.lzm` and whatever else `safe_open` takes work there then, and in the from_pretrained methods of
    transformers and in accelerate (see `routing`). May be called more than once: each call is undone by
    itself. torch, if there is one, is imported. Raises `ImportError` without safetensors.
    """
    global _installed, _depth
    with _lock:
        if _installed is None:
            _installed = _Replacement()
            _installed.apply()
        _depth += 1
        return Installation(_installed)


def uninstall() -> None:
    """Undo one `install`, the last that is in place; of none, nothing."""
    with _lock:
        if _depth:
            _leave()


def _leave() -> None:
    global _installed, _depth
    _depth = max(0, _depth - 1)
    if _depth == 0 and _installed is not None:
        _installed.undo()
        _installed = None


class _Replacement:
    """The originals and their stand-ins."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self._routing = Routing()
        root = package.installed()
        self._originals = {"safe_open": root.safe_open, "deserialize": root.deserialize}
        self._pairs: list[tuple[Any, Any]] = [
            (root.safe_open, stand_ins.safe_open),
            (root.deserialize, stand_ins.deserialize),
        ]
        if hasattr(root, "_safe_open_handle"):
            self._pairs.append((root._safe_open_handle, stand_ins.safe_open_handle))
        self._add("numpy", ("load_file", "load"))
        if importlib.util.find_spec("torch") is not None:
            self._add("torch", ("load_file", "load", "load_model"))

    def _add(self, module: str, names: tuple[str, ...]) -> None:
        theirs = package.installed(module)
        self._pairs += [(getattr(theirs, name), getattr(stand_ins, f"{module}_{name}")) for name in names]

    def apply(self) -> None:
        package.originals.update(self._originals)
        opening.watchers.append(self.opened)
        exchange(self._pairs)
        self._routing.apply()

    def undo(self) -> None:
        self._routing.undo()
        exchange([(ours, theirs) for theirs, ours in self._pairs])
        opening.watchers.remove(self.opened)
        package.originals.clear()
