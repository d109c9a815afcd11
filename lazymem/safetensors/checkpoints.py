# SPDX-License-Identifier: Apache-2.0
"""What stands in for accelerate's functions while lazymem is installed: they take URLs and snapshots, too.

accelerate looks for a local file, and hands its path to its own `load_state_dict`. It finds an empty file
here, whose path stands for the source; so devices, offloading, dtypes and ties remain its business, and all
arguments mean what they always do. Every other source goes the old way.

Relies on `accelerate.utils.modeling`: `load_checkpoint_in_model` checks that a path is a file, calls
`load_state_dict` by its global name, and without a device map ignores all arguments but those that are read
here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..store import locations

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("lazymem")

MODULE: Final = "accelerate.utils.modeling"
#: Of that module: what is replaced by what is called the same here.
NAMES: Final = ("load_checkpoint_in_model", "load_state_dict")

# Kept after it is taken away: code that took one of the functions goes on calling it.
_originals: dict[str, Any] = {}
_sources: dict[str, str] = {}


def is_for_lazymem(source: object) -> bool:
    """Whether it is a URL, or is called .lzm: what other libraries cannot open."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    location = os.fspath(source)
    return isinstance(location, str) and (
        locations.scheme_of(location) is not None or location.endswith(".lzm")
    )


def pairs(module: Any) -> list[tuple[Any, Any]]:
    """Functions of accelerate, as they are now, and what stands in for each."""
    _originals.update({name: getattr(module, name) for name in NAMES if hasattr(module, name)})
    return [(_originals[name], globals()[name]) for name in NAMES if name in _originals]


def _original(name: str) -> Any:
    # In a process where nothing was replaced, and which got the function by pickle, it is there as ever.
    return _originals[name] if name in _originals else getattr(importlib.import_module(MODULE), name)


def load_checkpoint_in_model(
    model: torch.nn.Module, checkpoint: Any, device_map: Any = None, *arguments: Any, **options: Any
) -> Any:
    """accelerate's, of whatever `lazymem.open` reads.

    Without a device map, and for device "cpu" of one, nothing is read before it is touched, but where the
    tensors have to be converted.
    """
    original = _original("load_checkpoint_in_model")
    if not is_for_lazymem(checkpoint):
        return original(model, checkpoint, device_map, *arguments, **options)
    by_torch = options.get("broadcast_from_rank0") or not options.get("full_state_dict", True)
    if device_map is None and not arguments and not by_torch and _is_plain(model):
        return _load_in_place(model, os.fspath(checkpoint), bool(options.get("strict")))
    with _standing_for(os.fspath(checkpoint)) as path:
        return original(model, path, device_map, *arguments, **options)


def _is_plain(model: torch.nn.Module) -> bool:
    """Whether it has only what torch itself has: no tensors that are spread over processes."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    return all(isinstance(t, torch.nn.Parameter) or type(t) is torch.Tensor for t in tensors) and not any(
        hasattr(t, "placements") for t in tensors
    )


def _load_in_place(model: torch.nn.Module, source: str, strict: bool) -> None:
    from ..torch import load_model

    _, unexpected = load_model(model, source, strict=strict)
    if unexpected:
        logger.warning(
            "%s: %s has no place for %s, which were not used",
            source, type(model).__name__, ", ".join(sorted(unexpected)),
        )  # fmt: skip


@contextlib.contextmanager
def _standing_for(source: str) -> Iterator[str]:
    # Its name ends as none does that accelerate would look into itself.
    with tempfile.NamedTemporaryFile(prefix="lazymem-", suffix=".lzm") as file:
        _sources[file.name] = source
        try:
            yield file.name
        finally:
            del _sources[file.name]


def load_state_dict(checkpoint_file: Any, device_map: Mapping[str, Any] | None = None) -> Any:
    """accelerate's, of whatever `lazymem.open` reads: all tensors, each on the device that the map says."""
    if not is_for_lazymem(checkpoint_file):
        return _original("load_state_dict")(checkpoint_file, device_map=device_map)
    from .. import torch as front

    path = os.fspath(checkpoint_file)
    source = _sources.get(path, path)
    # "disk": what goes there is written from main memory.
    places = {name: "cpu" if device == "disk" else device for name, device in (device_map or {}).items()}
    devices = set(places.values()) or {"cpu"}
    if len(devices) == 1:
        return front.load_file(source, devices.pop())
    tensors = front.load_file(source)
    for device in devices - {"cpu"}:
        # Opened again, so that the memory these are copied from goes with it.
        with front.open(source) as own:
            names = [name for name in own if _device_of(name, places) == device]
            tensors.update({name: own[name].to(device) for name in names})
    return tensors


def _device_of(name: str, places: Mapping[str, Any]) -> Any:
    """Of the innermost module that has one."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places.get(name, "cpu")
