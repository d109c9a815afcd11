# SPDX-License-Identifier: Apache-2.0
"""`open`, `load_file` and `load_model`: sources -> tensors -> a model's parameters."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .. import snapshot as snapshots
from ..composition import as_recipe, can_cast
from ..errors import LazymemError, OptionError, UnsupportedDtype
from ..order import model_order
from ..progress import Progress, reporting
from ..snapshot import Snapshot
from .mapping import Tensors
from .modules import assign_state, complain
from .streaming import stream
from .tensors import numpy_dtype

logger = logging.getLogger("lazymem")

StrPath = str | os.PathLike[str]
Dtype = torch.dtype | str
Device = torch.device | str | int


def open(source: StrPath, *, dtype: Dtype | None = None, **options: Any) -> Tensors:
    """A lazy mapping of names to tensors, for whatever takes a state_dict.

    source: a path or URL, see `lazymem.open`. dtype: show floating-point tensors as torch.float16, bfloat16,
    float32 or float64; each chunk is converted when it is first touched. options: further ones of
    `lazymem.open` (storage_options, cache, backend, ...); the mode is always "c", copy-on-write.
    Reads the index and no more. Raises as `lazymem.open`.
    """
    if "mode" in options:
        raise OptionError("tensors are always copy-on-write (mode 'c'), since torch may write to them")
    return Tensors(snapshots.open(source, mode="c", dtype=_dtype_name(dtype), **options))


def load_file(
    source: StrPath,
    device: Device = "cpu",
    *,
    dtype: Dtype | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """All tensors of `source` by name. On the CPU they share one region, and nothing is read yet.

    device: "meta" gives tensors without bytes; any other one gets them streamed piece by piece, with a few
        pieces of 16 MiB in memory at a time, and the call blocks until they are there.
    dtype, options: as for `open`. progress: of streaming, called with (bytes there, bytes in all); True shows
        a bar.
    Raises as `lazymem.open`; while streaming as `Snapshot.prefetch(wait=True)`.
    """
    target = torch.device(device)
    if target.type == "cpu":
        return dict(open(source, dtype=dtype, **options))
    with (
        snapshots.open(source, dtype=_dtype_name(dtype), **options) as snapshot,
        reporting(progress, f"loading to {target}") as report,
    ):
        return stream(snapshot, target, report)


def load_model(
    model: torch.nn.Module,
    source: StrPath,
    strict: bool = True,
    device: Device = "cpu",
    *,
    dtype: Dtype | None = None,
    background: bool = False,
    progress: Progress | bool | None = None,
    **options: Any,
) -> tuple[set[str], list[str]]:
    """Have the model's own parameters and buffers show the tensors of `source`; nothing is read yet.

    Parameters stay the objects that they are (optimizers, ties and hooks hold), those of the meta device
    included. Of tied weights one name in the source is enough. Where the source has another floating-point
    dtype than the model the model's is kept, and chunks are converted when they are first touched.

    strict: raise for names that are missing or left over. device: move the model there first, like
        `model.to(device)`, without what is about to be replaced; tensors are then streamed there.
    dtype: convert the model first, like `model.to(dtype)`, without what is about to be replaced.
    background: go on populating in the order of the model's layers after the call has returned, while the
        first forward pass runs: what it touches goes first. progress: of that (called in a thread of its
        own) or of streaming, with (bytes there, bytes in all); True shows a bar.

    Read and converted at once is only what cannot be shown: where the model has another memory format or an
    integer type, where tensors share memory without being one object. Buffers that are not saved stay
    as they are, on the meta device, too.
    Returns the names that the source lacks and those that the model does not have. Raises `RuntimeError`
    for shapes that differ, and if `strict` for such names; else as `lazymem.open`. Until the source is open
    the model is not touched.
    """
    target = torch.device(device)
    if target.type == "meta":
        raise OptionError("a model cannot be loaded to the meta device, which has no memory; choose another")
    wanted = None if dtype is None else numpy_name_to_torch(dtype)
    if target.type == "cpu":
        found, parts = _open_for(model, source, wanted, options)
    else:
        found, parts = load_file(source, target, progress=progress, **options), []
    if wanted is not None or target.type != "cpu":
        _convert(model, found, wanted, target)
    missing, unexpected = assign_state(model, found)
    if strict and (missing or unexpected):
        complain(model, missing, unexpected)
    if background:
        for snapshot, names in parts:
            _populate(snapshot, names, progress)
    return missing, unexpected


def numpy_name_to_torch(dtype: Dtype) -> torch.dtype:
    """torch.bfloat16 for itself and for "bfloat16". Raises `OptionError`."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise OptionError(f"dtype is {str(dtype)[:100]!r}; it must be one of torch's, such as torch.bfloat16")
    return found


def _dtype_name(dtype: Dtype | None) -> str | None:
    if dtype is None:
        return None
    return str(numpy_name_to_torch(dtype)).removeprefix("torch.")


def _open_for(
    model: torch.nn.Module, source: StrPath, dtype: torch.dtype | None, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], list[tuple[Snapshot, list[str]]]]:
    """Tensors in the model's dtypes, or in `dtype`, if that can be lazy; and which snapshot shows which."""
    plain = open(source, **options).snapshot
    recipes = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in plain or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        info = plain.info(name)
        wanted = numpy_dtype(dtype or tensor.dtype)
        if info.dtype != wanted and can_cast(info.dtype, wanted):
            recipes.append(as_recipe(info, wanted))
    cast = {recipe.name for recipe in recipes}
    parts = [(plain, [name for name in plain if name not in cast])]
    if recipes:
        parts.append((plain.compose(recipes), list(cast)))
    found = {name: tensor for snapshot, names in parts for name, tensor in _some(snapshot, names)}
    return {name: found[name] for name in plain}, parts


def _some(snapshot: Snapshot, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = Tensors(snapshot)
    for name in names:
        try:
            yield name, tensors[name]
        except UnsupportedDtype:  # strings, say: no parameter; its name counts as unexpected
            yield name, torch.empty(0, device="meta")


def _convert(
    model: torch.nn.Module, found: Mapping[str, torch.Tensor], dtype: torch.dtype | None, device: torch.device
) -> None:
    """As `model.to` does it; but what `found` replaces only gets fresh memory, which nothing has touched."""
    replaced = {
        id(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in found and isinstance(tensor, torch.Tensor) and tensor.shape == found[name].shape
    }

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta:
            return tensor.to(wanted)
        if id(tensor) in replaced:
            return torch.empty_like(tensor, dtype=wanted, device=device)
        return tensor.to(device=device, dtype=wanted)

    apply: Any = model._apply
    apply(convert)


def _populate(snapshot: Snapshot, names: list[str], progress: Progress | bool | None) -> None:
    ordered = model_order(names)
    if not progress:
        snapshot.prefetch(ordered)
        return

    def run() -> None:
        try:
            snapshot.prefetch(ordered, wait=True, progress=progress)
        except LazymemError as error:  # whoever touches it is told, too
            logger.warning("%s", error)

    threading.Thread(target=run, name="lazymem-background", daemon=True).start()
