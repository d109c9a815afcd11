# SPDX-License-Identifier: Apache-2.0
"""A model in an object store: how long until all of it, one tensor, or a few pages of it are in memory?

Each task is measured over loopback, which has no round trips, and again with 20 ms to the first byte
(relay.py). Requests and bytes over loopback are counted in a run of their own, whose time does not count.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from . import bounds
from . import remote_contenders as clients
from . import remote_sockets as sockets
from .data import Data
from .harness import Case, Meter, Metrics, Outcome, in_child
from .question import COLOURS, Column, Settings, error_bars, medians
from .remote_server import Model, NoServer, Place, Server, files_by_key, have, snapshot_key, start

TITLE: Final = "A model in S3: all of it, its first tensor, a few of its pages"
COLUMNS: Final = (
    Column("MB/s", "gb_per_s", 1000, 0),
    Column("of sockets", "of_sockets"),
    Column("requests", "requests", 1, 0),
    Column("MiB moved", "received_mib", 1, 1),
    Column("CPU s", "cpu_seconds"),
    Column("CPU s/GiB", "cpu_s_per_gib"),
    Column("peak MiB", "peak_mib", 1, 0),
    Column("import ms", "import_seconds", 1000, 0),
)
DELAY: Final = 0.020
_TENSOR_BYTES: Final = 16 << 20
_TOUCHES: Final = 100
_BOUND: Final = "sockets"
_MEMORY: Final = 11  # times the model's bytes: the server keeps five copies and takes 8.5, clients up to two

_LAZYMEM: Final = ("lazymem",)
_BOTO3: Final = ("boto3", "botocore.config", "s3transfer.manager")
_S3FS: Final = ("aiobotocore", "s3fs")  # without the first it is of a time before ours
_OBSTORE: Final = ("obstore", "obstore.store")
_ZARR: Final = (*_OBSTORE, "zarr", "zarr.storage", "zarr.codecs")
_RUNAI: Final = ("torch", "runai_model_streamer", "runai_model_streamer_s3", "boto3")


@dataclass(frozen=True)
class Contender:
    """run: one of remote_contenders'. modules: imported before the clock starts; skipped if missing.

    far: measured with latency too. cached: reads through a disk cache that is full.
    """

    name: str
    kind: str
    run: Callable[..., Any]
    modules: tuple[str, ...] = ()
    far: bool = True
    cached: bool = False


def _lazymem(
    name: str, key: str, run: Callable[..., Any] = clients.lazymem_load, far: bool = True, **options: Any
) -> Contender:
    return Contender(f"lazymem {name}", "lazymem", partial(run, key=key, **options), _LAZYMEM, far=far)


_ZSTD, _LZ4, _PLAIN, _SMALL = (snapshot_key(which) for which in ("zstd", "lz4", "none", "zstd 64K"))
_CACHED: Final = Contender(
    "lazymem zstd, warm disk cache",
    "lazymem",
    partial(clients.lazymem_load, key=_ZSTD, prefetch=True),
    _LAZYMEM,
    cached=True,
)
_SOCKETS: Final = Contender(_BOUND, "bound", sockets.load, _BOTO3)
_BLOCKS: Final = partial(clients.s3fs_load, cache_type="blockcache", block_size=4 << 20)
_DOWNLOAD: Final = Contender("boto3 download_file", "peer", clients.boto3_download, _BOTO3)
_PEERS: Final = (
    Contender("Run:ai streamer", "peer", clients.runai_load, _RUNAI),
    Contender("zarr zstd over obstore", "peer", clients.zarr_load, _ZARR),
    Contender("obstore ranges", "peer", clients.obstore_load, _OBSTORE),
)

RESTORE: Final = (
    _SOCKETS,
    _lazymem("zstd", _ZSTD, prefetch=False),
    _lazymem("zstd, prefetch", _ZSTD, prefetch=True),
    _lazymem("lz4, prefetch", _LZ4, prefetch=True, far=False),
    _lazymem("none, prefetch", _PLAIN, prefetch=True, far=False),
    _lazymem("in place, prefetch", Model.SAFETENSORS, prefetch=True),
    replace(_CACHED, far=False),
    Contender("boto3 get_object", "peer", clients.boto3_get, _BOTO3, far=False),
    _DOWNLOAD,
    Contender("s3fs readahead", "peer", clients.s3fs_load, _S3FS, far=False),
    *_PEERS,
)
FIRST: Final = (
    _SOCKETS,
    _lazymem("zstd", _ZSTD, prefetch=False),
    _lazymem("zstd, prefetch", _ZSTD, prefetch=True),
    _lazymem("in place, prefetch", Model.SAFETENSORS, prefetch=True),
    _CACHED,
    replace(_DOWNLOAD, far=False),
    Contender("s3fs blockcache 4 MiB", "peer", _BLOCKS, _S3FS),
    *_PEERS,
)
_TOUCH: Final = clients.lazymem_touch
_TOUCHED_BLOCKS: Final = partial(clients.s3fs_touch, cache_type="blockcache", block_size=1 << 20)
_TOUCHED_READAHEAD: Final = partial(clients.s3fs_touch, cache_type="readahead", block_size=1 << 20)
SPARSE: Final = (
    Contender(_BOUND, "bound", sockets.touch, _BOTO3),
    _lazymem("zstd", _ZSTD, _TOUCH),
    _lazymem("zstd 64 KiB chunks", _SMALL, _TOUCH),
    _lazymem("in place", Model.SAFETENSORS, _TOUCH, far=False),
    _lazymem("in place, 64 KiB chunks", Model.SAFETENSORS, _TOUCH, chunk_size=64 << 10),
    Contender("s3fs readahead 1 MiB", "peer", _TOUCHED_READAHEAD, _S3FS, far=False),
    Contender("s3fs blockcache 1 MiB", "peer", _TOUCHED_BLOCKS, _S3FS),
    Contender("zarr zstd over obstore", "peer", clients.zarr_touch, _ZARR, far=False),
    Contender("obstore ranges", "peer", clients.obstore_touch, _OBSTORE),
)


@dataclass(frozen=True)
class Task:
    """arguments: of the contenders' functions, beside meter, place and model. digest: of what they return.

    nbytes: what rates are of; 0: no rates.
    """

    name: str
    text: str
    contenders: Sequence[Contender]
    arguments: dict[str, Any]
    digest: int
    nbytes: int


def _tasks(model: Model, touch_count: int) -> Iterator[Task]:
    middle = [model.names[model.count // 2]]
    touches = model.touches(touch_count, clients.PIECE)
    yield Task(
        "restore", f"{model.nbytes >> 20} MiB into memory", RESTORE, {"names": model.names},
        model.digest_of(model.names), model.nbytes,
    )  # fmt: skip
    yield Task(
        "first", f"One tensor of {model.tensor_bytes >> 20} MiB", FIRST, {"names": middle},
        model.digest_of(middle), model.tensor_bytes,
    )  # fmt: skip
    yield Task(
        "sparse", f"{touch_count} random pieces of {clients.PIECE} bytes, one after the other", SPARSE,
        {"touches": touches}, model.digest_of_touches(touches, clients.PIECE), 0,
    )  # fmt: skip


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    data = Data(data.folder.with_name(f"model-{settings.model_mb}m"), settings.model_mb << 20, data.say)
    data.folder.mkdir(exist_ok=True)
    model = Model(data, max(data.nbytes // _TENSOR_BYTES, 8))
    try:
        need = _MEMORY * model.nbytes, f"with a model of {model.nbytes >> 20} MiB"
        server = start(settings.stack, lambda: dict(files_by_key(model)), need, DELAY, data.say)
    except NoServer as reason:
        settings.skipped.append(f"remote: no S3 server: {reason}")
        return
    decoded = model.snapshot("zstd")
    for task in _tasks(model, 10 if settings.tiny else _TOUCHES):
        for place in (server.direct, server.far):
            yield from _cases_of(task, place, server, model, settings)
            if task.name == "restore" and place is server.direct:
                yield Case(
                    "restore, bare decoder",
                    "bound",
                    partial(bounds.decode, snapshot=decoded, threads=settings.threads, target="fresh"),
                    model.nbytes,
                    files=(decoded,),
                    memory=model.nbytes * 5 // 4,
                    section=_section(task, place),
                )


def _section(task: Task, place: Place) -> str:
    return f"{task.text}, {place.text}"


def _cases_of(task: Task, place: Place, server: Server, model: Model, settings: Settings) -> Iterator[Case]:
    far = place is server.far
    prefix = f"{task.name}{' ' + place.name if far else ''}, "
    for one in task.contenders:
        if missing := [module for module in one.modules if not have(module)]:
            line = f"remote: {one.name} left out: {', '.join(missing)} is not installed"
            if line not in settings.skipped:
                settings.skipped.append(line)
            continue
        peer_in_tiny = settings.tiny and one.kind == "peer"  # once is enough to see whether it runs
        if far and (peer_in_tiny or not one.far):
            continue
        runs = {place.name: partial(_run, one, place, model, task.arguments)}
        if not far:
            runs["counted"] = partial(_run, one, server.counted, model, task.arguments)
        if one.cached:
            runs = {
                name: partial(run, cache=_fill(f"{task.name}-{name}", run, model))
                for name, run in runs.items()
            }
        apart = None
        if not far and not peer_in_tiny:
            apart = partial(
                apart_counts, runs["counted"], 0.0 if one.kind == "bound" else import_seconds(one.modules)
            )
        yield Case(
            name=prefix + one.name,
            kind=one.kind,
            run=runs[place.name],
            nbytes=task.nbytes,
            memory=task.nbytes * 5 // 4,
            digest=task.digest,
            params={"task": task.name, "contender": one.name, "place": place.name},
            against={"of_sockets": prefix + _BOUND},
            section=_section(task, place),
            apart=apart,
        )


def _run(
    one: Contender, place: Place, model: Model, arguments: dict[str, Any], meter: Meter, **options: Any
) -> Any:
    for module in one.modules:
        importlib.import_module(module)
    return one.run(meter, place, model, **arguments, **options)


def _fill(name: str, run: Callable[..., Any], model: Model) -> Path:
    """A cache folder, filled by a run that does not count. The cache tells ways to the server apart."""
    folder = model.data.folder / f"cache-{name.replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier server's
    in_child(lambda: bool(run(Meter(0), cache=folder)), deadline=120)
    return folder


def apart_counts(run: Callable[[Meter], Any], importing: float) -> Metrics:
    """Requests and bytes, counted on the way."""
    meter = Meter(0)
    run(meter)
    counted = {name: meter.metrics[name] for name in ("requests", "connections", "received_mib")}
    return counted | ({"import_seconds": importing} if importing else {})


@cache
def import_seconds(modules: tuple[str, ...], given: tuple[str, ...] = ("numpy",)) -> float:
    """What importing a contender costs a new process that has what is given."""
    code = (
        f"import time, {', '.join(given)}; started = time.perf_counter(); "
        f"import {', '.join(modules)}; print(time.perf_counter() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [one for one in outcomes if one.error is None and "task" in one.case.params]
    panels = list(dict.fromkeys((one.case.params["task"], one.case.section) for one in shown))
    if not panels:
        return
    for axes, (_, section) in zip(
        figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat, panels, strict=False
    ):
        ones = [one for one in shown if one.case.section == section][::-1]
        axes.barh(
            [one.case.params["contender"] for one in ones],
            medians(ones, "seconds"),
            xerr=error_bars(ones, "seconds"),
            color=[COLOURS[one.case.kind] for one in ones],
        )
        axes.set_title(section, fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7)
