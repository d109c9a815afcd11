# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained`: transformers builds the model, lazymem gives it weights that are read when touched.

transformers' own from_pretrained runs on a folder with the model's small files and, where it looks for
weights, deferred tensors, so that everything it knows of a model (renamed and fused weights, ties, missing
keys, buffers) holds. What it leaves in the model is then made real, all in one or two regions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import transformers
from transformers import modeling_utils

from .. import snapshot as snapshots
from ..errors import FormatError, OptionError, UnsupportedFormat
from ..order import model_order
from ..progress import Progress, reporting
from ..snapshot import Snapshot
from .deferred import Composed, Deferred, defer, realize
from .files import write_files
from .redirection import EMPTY_FILE, shown_as

#: Levels of a configuration; real ones have some ten.
_MAX_NESTING: Final = 64


def from_pretrained(
    source: str | os.PathLike[str],
    *model_args: Any,
    model_class: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | bool | None = None,
    backend: str | None = None,
    background: bool = False,
    progress: Progress | bool | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers model of `source`, ready to be used; its weights are read when they are touched.

    source: a snapshot built of a model folder, or such a folder (its config.json is read), local or by URL.
    model_class: one of transformers' classes or Auto classes; None: the one that config.json names.
    storage_options, cache, backend: see `lazymem.open`. model_args, kwargs: for the class's own
        `from_pretrained` (dtype, config, attn_implementation, output_loading_info, ...). dtype=: weights of
        another floating-point dtype are converted chunk by chunk, when they are touched. device_map= may
        name devices; offloading to disk is refused, since the weights lie on one already.
    background: go on populating in the order of the layers after the call has returned. progress: wait for
        that instead, and tell it: called with (bytes there, bytes in all); True shows a bar.

    Experts that transformers fuses into one parameter stay lazy one by one. Weights are copy-on-write.
    Raises as `lazymem.open`; `UnsupportedFormat` where there is no config.json; what transformers raises.
    """
    _check(kwargs)
    snapshot = snapshots.open(source, mode="c", storage_options=storage_options, cache=cache, backend=backend)
    with tempfile.TemporaryDirectory(prefix="lazymem-") as temporary:
        # One name for one model: code that comes with a model becomes a module of that name.
        folder = os.path.join(temporary, "lazymem_" + hashlib.sha256(snapshot.url.encode()).hexdigest()[:16])
        os.mkdir(folder)
        weights = os.path.join(folder, "model.safetensors")
        with open(weights, "wb") as file:
            file.write(EMPTY_FILE)
        names = write_files(snapshot, folder)
        if "config.json" not in names and not isinstance(kwargs.get("config"), transformers.PretrainedConfig):
            raise UnsupportedFormat(
                f"{snapshot.url}: carries no config.json, so it is not known what model it is; name the "
                "model's folder, build a snapshot of it (`lazymem build FOLDER`), or give config=",
                url=snapshot.url,
                field="config.json",
            )
        named = _class_of(snapshot, folder)
        chosen = model_class or named
        with (
            _naming(snapshot.url, folder),
            _real_before_dispatch(),
            shown_as(weights, {name: defer(snapshot, name) for name in snapshot}),
        ):
            result = chosen.from_pretrained(folder, *model_args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    fused = _make_real(model)
    # Not the folder, which is gone.
    model.name_or_path = model.config.name_or_path = snapshot.url
    if background or progress:
        _populate(snapshot, fused, progress)
    return result


def _check(kwargs: dict[str, Any]) -> None:
    """Refuse what has another source of weights in mind; drop what says nothing, as it usually does."""
    for name in ("state_dict", "gguf_file", "variant", "subfolder"):
        if kwargs.pop(name, None):
            raise OptionError(f"{name}= means nothing here: the weights are those of the source")
    kwargs.pop("use_safetensors", None)
    device_map = kwargs.get("device_map")
    on_disk = isinstance(device_map, Mapping) and "disk" in map(str, device_map.values())
    if on_disk or kwargs.get("offload_folder"):
        raise OptionError(
            "weights are not offloaded to disk here: they lie there already, and are read when they are "
            "touched; leave offload_folder= and 'disk' out"
        )


@contextlib.contextmanager
def _naming(url: str, folder: str) -> Iterator[None]:
    """Errors name the source and not a folder that is gone when they are read."""
    try:
        yield
    except Exception as error:
        error.args = tuple(
            text.replace(folder, url) if isinstance(text, str) else text for text in error.args
        )
        raise


_dispatch_lock = threading.Lock()
_dispatching = 0
_dispatch_before: Any = None


@contextlib.contextmanager
def _real_before_dispatch() -> Iterator[None]:
    """Within the block accelerate's hooks, which move weights between devices, find a model that is real."""
    global _dispatching, _dispatch_before
    library: Any = modeling_utils
    with _dispatch_lock:
        if _dispatching == 0 and hasattr(library, "accelerate_dispatch"):
            _dispatch_before = library.accelerate_dispatch
            library.accelerate_dispatch = _dispatch
        _dispatching += 1
    try:
        yield
    finally:
        with _dispatch_lock:
            _dispatching -= 1
            if _dispatching == 0 and getattr(library, "accelerate_dispatch", None) is _dispatch:
                library.accelerate_dispatch = _dispatch_before


def _dispatch(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    _make_real(model)
    return _dispatch_before(model, *args, **kwargs)


def _class_of(snapshot: Snapshot, folder: str) -> Any:
    """The class that config.json names; AutoModel where it names none that is known."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return transformers.AutoModel
    with open(path, "rb") as file:
        try:
            config = json.load(file)  # not the strict reader: there are configurations with Infinity
            problem = _problem_of(config)
        except (ValueError, RecursionError) as error:
            problem = f"is no JSON ({error})"
    if problem is not None:
        raise FormatError(
            f"{snapshot.url}: config.json {problem}; get the model again",
            url=snapshot.url,
            field="config.json",
        )
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if is_model:
        return found
    auto_map = config.get("auto_map")  # code of the model's own; whether it may run, transformers asks
    for auto, reference in auto_map.items() if isinstance(auto_map, dict) else ():
        if (
            isinstance(reference, str)
            and reference.rpartition(".")[2] == name
            and auto.startswith("AutoModel")
        ):
            return getattr(transformers, auto, transformers.AutoModel)
    return transformers.AutoModel


def _problem_of(config: Any) -> str | None:
    """What keeps transformers, which copies and prints it recursively, from reading it; None if nothing."""
    if not isinstance(config, dict):
        return f"is a JSON {type(config).__name__} instead of an object"
    level: list[Any] = [config]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return None
    return f"is nested more than {_MAX_NESTING} deep"


def _make_real(model: torch.nn.Module) -> Composed | None:
    """Replace what is deferred in the model, ties kept. Returns what `realize` composed."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    values: dict[int, Deferred] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if isinstance(tensor, Deferred):
                    places.setdefault(id(tensor), []).append((store, name))
                    values[id(tensor)] = tensor
                    names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
    real, composed = realize(list(values.values()), list(names.values()))
    for key, tensor in zip(values, real, strict=True):
        old: Any = values[key]
        new: Any = tensor
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        new._is_hf_initialized = True
        for store, name in places[key]:
            store[name] = new
    return composed


def _populate(snapshot: Snapshot, composed: Composed | None, progress: Progress | bool | None) -> None:
    """In the order of the layers. What is shown composed need not be populated as it lies, too."""
    used = composed.used if composed is not None else frozenset()
    plain = [name for name in snapshot if name not in used]
    with reporting(progress, "loading weights") as report:
        snapshot.prefetch(model_order(plain), wait=report is not None, progress=report)
        if composed is not None:
            composed.snapshot.prefetch(order="model", wait=report is not None, progress=report)
