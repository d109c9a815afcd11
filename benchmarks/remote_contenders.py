# SPDX-License-Identifier: Apache-2.0
"""lazymem, and what a user would pick instead, from a model's URL to tensors, or pieces of them, in memory.

Every contender is imported before the clock starts, and makes its client after it: what importing costs
is a column of its own. lazymem's fetcher starts, and imports what it needs, on the clock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem
from lazymem.fetcher.client import fetcher_status

from .bounds import Bytes, as_bytes, touch
from .contenders import note_stats
from .harness import Meter
from .remote_meter import measured
from .remote_server import BUCKET, Model, Place, header_of, tensors_of

PIECE: Final = 4096  # bytes of a touch
#: Of the bound and of the plain client.
CONNECTIONS: Final = 8
#: What a client of safetensors reads at first, in the hope that it holds the header.
_HEADER: Final = 64 << 10

Touches = Sequence[tuple[str, int]]


# ---- lazymem ----


def lazymem_load(
    meter: Meter, place: Place, model: Model, names: Sequence[str], key: str, prefetch: bool, **options: Any
) -> list[Bytes]:
    with measured(meter, place):
        snapshot = lazymem.open(f"s3://{BUCKET}/{key}", **options)
        views = [as_bytes(snapshot[name]) for name in names]
        if prefetch:
            snapshot.prefetch(names, wait=True)
        for view in views:
            touch(view)
    note_stats(meter, snapshot)
    status = fetcher_status()
    meter.note(**{f"fetcher_{name}": value for name, value in status.items() if isinstance(value, int)})
    return views


def lazymem_touch(
    meter: Meter, place: Place, model: Model, touches: Touches, key: str, **options: Any
) -> list[Bytes]:
    with measured(meter, place):
        snapshot = lazymem.open(f"s3://{BUCKET}/{key}", **options)
        pieces = [as_bytes(snapshot[name])[offset : offset + PIECE].copy() for name, offset in touches]
    note_stats(meter, snapshot)
    return pieces


# ---- boto3 ----


def boto3_get(meter: Meter, place: Place, model: Model, names: Sequence[str]) -> list[Bytes]:
    """One request, into memory."""
    with measured(meter, place):
        body = place.client().get_object(Bucket=BUCKET, Key=Model.SAFETENSORS)["Body"].read()
        views = tensors_of(np.frombuffer(body, np.uint8), names)
        for view in views:
            touch(view)
    return views


def boto3_download(meter: Meter, place: Place, model: Model, names: Sequence[str]) -> list[Bytes]:
    """download_file as it comes (10 threads, 8 MiB a request), then the file mapped."""
    folder = Path(tempfile.mkdtemp(dir=model.data.folder))
    try:
        with measured(meter, place):
            place.client().download_file(BUCKET, Model.SAFETENSORS, str(folder / "model"))
            views = tensors_of(np.memmap(folder / "model", np.uint8, "r"), names)
            for view in views:
                touch(view)
    finally:
        shutil.rmtree(folder)
    return views


# ---- fsspec / s3fs ----


def _s3fs_open(**options: Any) -> Any:
    import s3fs

    filesystem = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        config_kwargs={"s3": {"addressing_style": "path"}},
        skip_instance_cache=True,
    )
    return filesystem.open(f"{BUCKET}/{Model.SAFETENSORS}", "rb", **options)


def s3fs_load(meter: Meter, place: Place, model: Model, names: Sequence[str], **options: Any) -> list[Bytes]:
    with measured(meter, place):
        views = []
        with _s3fs_open(**options) as file:
            where = header_of(file.read(_HEADER))
            for name in names:
                file.seek(where[name].start)
                view = np.empty(where[name].stop - where[name].start, np.uint8)
                file.readinto(view)
                touch(view)
                views.append(view)
    return views


def s3fs_touch(meter: Meter, place: Place, model: Model, touches: Touches, **options: Any) -> list[Bytes]:
    with measured(meter, place):
        pieces = []
        with _s3fs_open(**options) as file:
            where = header_of(file.read(_HEADER))
            for name, offset in touches:
                file.seek(where[name].start + offset)
                pieces.append(np.frombuffer(file.read(PIECE), np.uint8))
    return pieces


# ---- Run:ai model streamer ----


def runai_load(meter: Meter, place: Place, model: Model, names: Sequence[str]) -> list[Bytes]:
    with measured(meter, place):
        import torch
        from runai_model_streamer import SafetensorsStreamer

        tensors: dict[str, Bytes] = {}
        wanted = names if len(names) < model.count else None
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(f"s3://{BUCKET}/{Model.SAFETENSORS}", tensor_names=wanted)
            for name, tensor in streamer.get_tensors():
                tensors[name] = tensor.view(torch.uint8).numpy()
                touch(tensors[name])
    return [tensors[name] for name in names]


# ---- zarr over obstore, and obstore alone ----


def _obstore(prefix: str | None = None) -> Any:
    from obstore.store import S3Store

    return S3Store(
        BUCKET,
        prefix=prefix,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        region=os.environ["AWS_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def _zarr_group() -> Any:
    import zarr
    from zarr.storage import ObjectStore

    return zarr.open_group(ObjectStore(_obstore(Model.ZARR), read_only=True), mode="r")


def zarr_load(
    meter: Meter, place: Place, model: Model, names: Sequence[str], threads: int = 1
) -> list[Bytes]:
    with measured(meter, place):
        group = _zarr_group()

        def load(name: str) -> Bytes:
            view = as_bytes(np.asarray(group[name][:]))
            touch(view)
            return view

        with ThreadPoolExecutor(threads) as pool:
            views = list(pool.map(load, names))
    return views


def zarr_touch(meter: Meter, place: Place, model: Model, touches: Touches) -> list[Bytes]:
    with measured(meter, place):
        group, arrays, pieces = _zarr_group(), {}, []
        for name, offset in touches:
            array = arrays.setdefault(name, None) or group[name]
            arrays[name] = array
            first = offset // array.dtype.itemsize
            pieces.append(as_bytes(np.asarray(array[first : first + PIECE // array.dtype.itemsize])))
    return pieces


def obstore_load(meter: Meter, place: Place, model: Model, names: Sequence[str]) -> list[Bytes]:
    """A range a tensor and thread; a lone tensor in several. Its buffers are used as they come."""
    with measured(meter, place):
        import obstore

        store = _obstore()
        header = obstore.get_range(store, Model.SAFETENSORS, start=0, length=_HEADER)
        where = header_of(memoryview(header))
        parts = [where[name] for name in names]
        if len(names) == 1:
            step = -(-(parts[0].stop - parts[0].start) // CONNECTIONS)
            parts = [
                slice(first, min(first + step, parts[0].stop))
                for first in range(parts[0].start, parts[0].stop, step)
            ]

        def get(part: slice) -> Bytes:
            view = np.frombuffer(
                obstore.get_range(store, Model.SAFETENSORS, start=part.start, end=part.stop), np.uint8
            )
            touch(view)
            return view

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            views = list(pool.map(get, parts))
        if len(names) == 1:
            views = [np.concatenate(views)]
    return views


def obstore_touch(meter: Meter, place: Place, model: Model, touches: Touches) -> list[Bytes]:
    with measured(meter, place):
        import obstore

        store = _obstore()
        header = obstore.get_range(store, Model.SAFETENSORS, start=0, length=_HEADER)
        where, pieces = header_of(memoryview(header)), []
        for name, offset in touches:
            got = obstore.get_range(store, Model.SAFETENSORS, start=where[name].start + offset, length=PIECE)
            pieces.append(np.frombuffer(got, np.uint8))
    return pieces
