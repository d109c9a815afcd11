# SPDX-License-Identifier: Apache-2.0
"""lazymem, and what a user would pick instead, from a path or URL to a Llama that generates.

A loader makes the model; `tokens` holds the clock around it and generation. All loaders but transformers'
own put their tensors into the same skeleton on the meta device, without copying.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem
from lazymem import snapshot as snapshots

from .bounds import Bytes, fresh_memory, touch
from .harness import Meter
from .llama import Llama, generate, skeleton, start_torch
from .page_cache import evict
from .remote_meter import measured
from .remote_server import BUCKET, Place

_PIECE: Final = 4 << 20  # bytes of a read

#: From where the weights lie, and the way there (None: a local file), to a model.
Loader = Callable[[str, Place | None, Any], Any]


# ---- what is measured ----


def tokens(
    meter: Meter,
    load: Loader,
    source: str,
    llama: Llama,
    place: Place | None = None,
    cold: tuple[Path, ...] = (),
) -> np.ndarray[Any, Any]:
    """Open, generate; seconds until the model is there, until the first token, until the last one."""
    start_torch()
    config = llama.config()
    for path in cold:
        evict(path)
    with _snapshots_kept() as opened, measured(meter, place):
        started = time.perf_counter()
        model = load(source, place, config)
        ready = time.perf_counter()
        found, first = generate(model, llama.count)
    meter.note(open_seconds=ready - started, first_token_seconds=first - started)
    _note_stats(meter, opened)
    return np.array(found)


def first_layer(
    meter: Meter,
    load: Callable[[str, Place, Sequence[str]], dict[str, Any]],
    source: str,
    names: Sequence[str],
    place: Place,
) -> list[Bytes]:
    """The first layer's weights, and nothing else, in memory."""
    import torch

    with _snapshots_kept() as opened, measured(meter, place):
        tensors = load(source, place, names)
        views = [tensors[name].reshape(-1).view(torch.uint8).numpy() for name in names]
        for view in views:
            touch(view)
    _note_stats(meter, opened)
    return views


@contextmanager
def _snapshots_kept() -> Iterator[list[lazymem.Snapshot]]:
    """What is opened within, for its counters: a model keeps the memory alive, and not the snapshot."""
    opened: list[lazymem.Snapshot] = []
    before = snapshots.Snapshot.__init__

    def init(self: lazymem.Snapshot, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        opened.append(self)

    snapshots.Snapshot.__init__ = init  # type: ignore[method-assign]
    yield opened


def _note_stats(meter: Meter, opened: Iterable[lazymem.Snapshot]) -> None:
    counters = [snapshot.stats() for snapshot in opened]
    if counters:
        names = ("faults", "chunks_populated", "chunks_demand", "bytes_read", "read_seconds", "check_seconds",
                 "decode_seconds", "install_seconds")  # fmt: skip
        meter.note(**{name: sum(getattr(one, name) for one in counters) for name in names})


# ---- bounds ----


def resident(meter: Meter, source: str, llama: Llama) -> np.ndarray[Any, Any]:
    """Generation itself: the weights have been copied into memory."""
    start_torch()
    model = safetensors(source, None, llama.config(), backend="pread")
    for tensor in model.parameters():
        tensor.data = tensor.clone()
    with measured(meter, None):
        started = time.perf_counter()
        found, first = generate(model, llama.count)
    meter.note(open_seconds=0.0, first_token_seconds=first - started)
    return np.array(found)


def read_file(meter: Meter, path: Path, cold: bool) -> Bytes:
    """All of a file into fresh memory, with one thread."""
    if cold:
        evict(path)
    with measured(meter, None):
        target = fresh_memory(path.stat().st_size, huge=False)
        done, view = 0, memoryview(target)
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(view[done : done + _PIECE]):
                done += got
    return target


# ---- loaders ----


def _assigned(config: Any, state: dict[str, Any]) -> Any:
    model = skeleton(config)
    model.load_state_dict(state, assign=True)
    return model


def transformers(source: str, place: Place | None, config: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(source)


def safetensors(source: str, place: Place | None, config: Any, **options: Any) -> Any:
    from safetensors.torch import load_file

    return _assigned(config, load_file(source, **options))


def torch_mmap(source: str, place: Place | None, config: Any) -> Any:
    import torch

    return _assigned(config, torch.load(source, mmap=True, weights_only=True))


def runai(source: str, place: Place | None, config: Any) -> Any:
    return _assigned(config, runai_tensors(source, place, None))


def runai_tensors(source: str, place: Place | None, names: Sequence[str] | None) -> dict[str, Any]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(source, tensor_names=names)
        return dict(streamer.get_tensors())


def tensorizer(source: str, place: Place | None, config: Any) -> Any:
    return _assigned(config, tensorizer_tensors(source, place, None))


def tensorizer_tensors(source: str, place: Place | None, names: Sequence[str] | None) -> dict[str, Any]:
    from tensorizer import TensorDeserializer
    from tensorizer.stream_io import open_stream

    file: Any = source
    if place:
        file = open_stream(
            source,
            s3_access_key_id=place.access_key,
            s3_secret_access_key=place.secret_key,
            s3_endpoint=place.endpoint,
            force_http=True,
        )
    wanted = names and frozenset(names).__contains__
    return dict(TensorDeserializer(file, device="cpu", filter_func=wanted))


def zipnn(source: str, place: Place | None, config: Any) -> Any:
    from zipnn.zipnn import SafeOpen

    with SafeOpen(source, "pt") as file:
        return _assigned(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def downloaded(source: str, place: Place | None, config: Any) -> Any:
    """boto3's download_file as it comes, then safetensors; the file is gone when the process is."""
    with _download(source, place) as path:
        return safetensors(path, place, config)


def downloaded_tensors(source: str, place: Place, names: Sequence[str]) -> dict[str, Any]:
    from safetensors import safe_open

    with _download(source, place) as path, safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _download(source: str, place: Place | None) -> Iterator[str]:
    assert place
    folder = tempfile.mkdtemp(prefix="lazymem-bench-")
    try:
        path = os.path.join(folder, "model.safetensors")
        place.client().download_file(BUCKET, source.removeprefix(f"s3://{BUCKET}/"), path)
        yield path
    finally:
        shutil.rmtree(folder)  # what is mapped lives on


def lazymem_torch(source: str, place: Place | None, config: Any, **options: Any) -> Any:
    import lazymem.torch

    model = skeleton(config)
    lazymem.torch.load_model(model, source, **options)
    return model


def lazymem_transformers(source: str, place: Place | None, config: Any, **options: Any) -> Any:
    import lazymem.transformers

    return lazymem.transformers.from_pretrained(source, **options)


def lazymem_tensors(source: str, place: Place, names: Sequence[str], prefetch: bool) -> dict[str, Any]:
    import lazymem.torch

    tensors = lazymem.torch.open(source)
    if prefetch:
        tensors.prefetch(names)
    return {name: tensors[name] for name in names}
