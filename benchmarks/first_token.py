# SPDX-License-Identifier: Apache-2.0
"""A small Llama in a file or in S3: how long until its first token, and until all of a few?

From disk with the page cache warm and cold, from S3 over loopback and with 20 ms to the first byte; and from
S3 the first layer's weights alone. Everybody's tokens must be those of transformers. This process imports
torch before it forks, since that takes longer than a measurement; until it has forked it has one thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import bounds
from . import first_token_contenders as loaders
from . import remote_sockets as sockets
from .data import Data, digest
from .harness import Case, Meter, Metrics, Outcome, in_child
from .llama import Llama
from .page_cache import cached_share, evict
from .question import COLOURS, Column, Settings, error_bars, medians
from .remote import DELAY, apart_counts, import_seconds
from .remote_server import BUCKET, NoServer, Place, Server, have, start

TITLE: Final = "A Llama's first token, and all tokens"
COLUMNS: Final = (
    Column("model ms", "open_seconds", 1000, 0),
    Column("first ms", "first_token_seconds", 1000, 0),
    Column("first:peer", "first_of_best"),
    Column("all:peer", "all_of_best"),
    Column("of resident", "of_resident"),
    Column("peak MiB", "peak_mib", 1, 0),
    Column("anon MiB", "anonymous_mib", 1, 0),
    Column("disk MiB", "disk_mib", 1, 0),
    Column("requests", "requests", 1, 0),
    Column("MiB moved", "received_mib", 1, 0),
    Column("CPU s", "cpu_seconds"),
    Column("faults", "faults", 1, 0),
    Column("read s", "read_seconds"),
    Column("check s", "check_seconds"),
    Column("decode s", "decode_seconds"),
    Column("install s", "install_seconds"),
    Column("import ms", "import_seconds", 1000, 0),
)
_TOKENS: Final = 8
_NEEDED: Final = ("torch", "transformers", "safetensors")
_GIVEN: Final = ("numpy", "torch", "transformers.models.llama.modeling_llama")
_RESIDENT: Final = "warm, weights in memory"
_MEMORY: Final = 8  # times the model's bytes: the server takes 4.6 for its three objects, clients up to three


@dataclass(frozen=True)
class Contender:
    """load: of first_token_contenders. source: the file, by its name in `_files`, or with `bucket` its key.

    modules: imported before the clock starts; left out if missing. tiny: runs in a tiny run, too.
    """

    name: str
    kind: str
    load: Callable[..., Any]
    source: str
    modules: tuple[str, ...] = ()
    tiny: bool = True


_TORCH, _TRANSFORMERS = ("lazymem.torch",), ("lazymem.transformers",)
_RUNAI: Final = ("runai_model_streamer",)
_RUNAI_S3: Final = ("runai_model_streamer", "runai_model_streamer_s3", "boto3")
_TENSORIZER: Final = ("tensorizer",)
_SAFETENSORS: Final = ("safetensors.torch",)
_BOTO3: Final = ("boto3", "botocore.config", "s3transfer.manager", *_SAFETENSORS)
_own, _hf = loaders.lazymem_torch, loaders.lazymem_transformers
_background = partial(_own, background=True)
_pread = partial(loaders.safetensors, backend="pread")

LOCAL: Final = (
    Contender("lazymem in place", "lazymem", _own, "safetensors", _TORCH),
    Contender("lazymem.transformers in place", "lazymem", _hf, "folder", _TRANSFORMERS, tiny=False),
    Contender("lazymem .lzm", "lazymem", _own, "lzm", _TORCH),
    Contender("lazymem .lzm, background", "lazymem", _background, "lzm", _TORCH),
    Contender("lazymem.transformers .lzm", "lazymem", _hf, "lzm", _TRANSFORMERS),
    Contender("lazymem .lzm, codec none", "lazymem", _own, "plain lzm", _TORCH, tiny=False),
    Contender("transformers", "peer", loaders.transformers, "folder"),
    Contender("safetensors mmap", "peer", loaders.safetensors, "safetensors", _SAFETENSORS),
    Contender("safetensors pread", "peer", _pread, "safetensors", _SAFETENSORS, tiny=False),
    Contender("torch.load mmap", "peer", loaders.torch_mmap, "bin"),
    Contender("Run:ai streamer", "peer", loaders.runai, "safetensors", _RUNAI),
    Contender("tensorizer", "peer", loaders.tensorizer, "tensors", _TENSORIZER),
    Contender("ZipNN", "peer", loaders.zipnn, "zipnn", ("zipnn.zipnn", *_SAFETENSORS)),
)
REMOTE: Final = (
    Contender("lazymem .lzm", "lazymem", _own, "lzm", _TORCH, tiny=False),
    Contender("lazymem .lzm, background", "lazymem", _background, "lzm", _TORCH),
    Contender("lazymem in place", "lazymem", _own, "safetensors", _TORCH),
    Contender("lazymem in place, background", "lazymem", _background, "safetensors", _TORCH, tiny=False),
    Contender(
        "lazymem.transformers .lzm, background",
        "lazymem",
        partial(_hf, background=True),
        "lzm",
        _TRANSFORMERS,
        tiny=False,
    ),
    Contender("boto3 download_file, safetensors", "peer", loaders.downloaded, "safetensors", _BOTO3),
    Contender("Run:ai streamer", "peer", loaders.runai, "safetensors", _RUNAI_S3),
    Contender("tensorizer", "peer", loaders.tensorizer, "tensors", _TENSORIZER),
)
_touched, _asked = (partial(loaders.lazymem_tensors, prefetch=ahead) for ahead in (False, True))
LAYER: Final = (
    Contender("lazymem .lzm", "lazymem", _touched, "lzm", _TORCH, tiny=False),
    Contender("lazymem .lzm, prefetch", "lazymem", _asked, "lzm", _TORCH),
    Contender("lazymem in place, prefetch", "lazymem", _asked, "safetensors", _TORCH, tiny=False),
    Contender("boto3 download_file, safetensors", "peer", loaders.downloaded_tensors, "safetensors", _BOTO3),
    Contender("Run:ai streamer", "peer", loaders.runai_tensors, "safetensors", _RUNAI_S3),
    Contender("tensorizer", "peer", loaders.tensorizer_tensors, "tensors", _TENSORIZER),
)
#: Objects of the bucket, by sources' names.
_KEYS: Final = {
    "safetensors": "llama/model.safetensors",
    "lzm": "llama.lzm",
    "tensors": "llama.tensors",
}


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    if missing := [module for module in _NEEDED if not have(module)]:
        settings.skipped.append(
            f"first_token: {', '.join(missing)} not installed (pip install lazymem[test])"
        )
        return
    for module in _GIVEN:
        importlib.import_module(module)
    data = Data(data.folder.with_name(f"llama-{settings.model_mb}m"), settings.model_mb << 20, data.say)
    data.folder.mkdir(exist_ok=True)
    llama = Llama(data, 2 if settings.tiny else _TOKENS, settings.tiny)
    question = _Question(llama, settings, _files(llama), llama.tokens_digest())
    yield from question.local()
    yield from question.remote()


def _files(llama: Llama) -> dict[str, Path]:
    """Sources by their names."""
    files = {
        "folder": llama.folder(),
        "safetensors": llama.safetensors(),
        "bin": llama.bin(),
        "lzm": llama.snapshot("zstd"),
        "plain lzm": llama.snapshot("none"),
    }
    if have("tensorizer"):
        files["tensors"] = llama.tensors()
    if have("zipnn"):
        files["zipnn"] = llama.zipnn()
    return files


@dataclass(frozen=True)
class _Question:
    llama: Llama
    settings: Settings
    files: Mapping[str, Path]
    tokens: int

    @property
    def nbytes(self) -> int:
        return self.files["safetensors"].stat().st_size

    # ---- from disk ----

    def local(self) -> Iterator[Case]:
        plain, packed = self.files["safetensors"], self.files["lzm"]
        ways = [("warm", "From disk, page cache warm")]
        if _forgets(plain):
            ways.append(("cold", "From disk, page cache cold"))
        else:
            self.settings.skipped.append("first_token: no cold runs, the kernel keeps the files in memory")
        for way, section in ways:
            cold = way == "cold"
            for one in self._wanted(LOCAL, once=cold):
                path = self.files[one.source]
                weights = plain if one.source == "folder" else path
                run = partial(
                    _tokens, one, source=str(path), llama=self.llama, cold=(weights,) if cold else ()
                )
                apart = None if cold or self.settings.tiny else partial(_importing, one.modules)
                yield self._case(way, one, section, run, self.tokens, () if cold else (weights,), apart)
            read = Contender("read the file", "bound", loaders.read_file, "safetensors")
            kept = () if cold else (plain,)
            yield self._case(
                way, read, section, partial(loaders.read_file, path=plain, cold=cold), _digest_of(plain), kept
            )
        section = ways[0][1]
        rest = Contender(_RESIDENT.removeprefix("warm, "), "bound", loaders.resident, "safetensors")
        run = partial(loaders.resident, source=str(plain), llama=self.llama)
        yield self._case("warm", rest, section, run, self.tokens, (plain,))
        rest = Contender("bare decoder", "bound", bounds.decode, "lzm")
        run = partial(bounds.decode, snapshot=packed, threads=self.settings.threads, target="fresh")
        yield self._case("warm", rest, section, run, None, (packed,))

    # ---- from S3 ----

    def remote(self) -> Iterator[Case]:
        objects = {key: self.files[name] for name, key in _KEYS.items() if name in self.files}
        need = _MEMORY * self.nbytes, f"with a Llama of {self.nbytes >> 20} MiB"
        try:
            server = start(self.settings.stack, lambda: objects, need, DELAY, self.llama.data.say)
        except NoServer as reason:
            self.settings.skipped.append(f"first_token: no S3 server: {reason}")
            return
        names, layer = self.llama.first_layer(), self.llama.first_layer_digest()
        for place in (server.direct, server.far):
            yield from self._tokens_from(place, server)
        for place in (server.direct, server.far):
            yield from self._layer_from(place, server, names, layer)

    def _tokens_from(self, place: Place, server: Server) -> Iterator[Case]:
        section = f"From S3, {place.text}"
        for one in self._wanted(REMOTE, once=place is server.far):
            run = partial(_tokens, one, source=_url(one), llama=self.llama)
            yield self._remote_case("S3", one, section, run, self.tokens, place, server)
        path = self.files["safetensors"]
        bound = Contender("sockets", "bound", _receive, "safetensors")
        receive = partial(_receive, size=self.nbytes)
        yield self._remote_case("S3", bound, section, receive, _digest_of(path), place, server)

    def _layer_from(self, place: Place, server: Server, names: Sequence[str], layer: int) -> Iterator[Case]:
        section = f"The first layer's weights alone, from S3, {place.text}"
        for one in self._wanted(LAYER, once=place is server.far):
            run = partial(_layer, one, source=_url(one), names=names)
            yield self._remote_case("layer", one, section, run, layer, place, server)

    # ---- both ----

    def _wanted(self, ones: Sequence[Contender], once: bool) -> Iterator[Contender]:
        """Those that are installed. once: this way has been tried before, in a tiny run one is enough."""
        if self.settings.tiny:
            ones = [one for one in ones if one.tiny][: 1 if once else None]
        for one in ones:
            missing = [module for module in one.modules if not have(module)]
            line = f"first_token: {one.name} left out: {', '.join(missing)} is not installed"
            if not missing:
                yield one
            elif line not in self.settings.skipped:
                self.settings.skipped.append(line)

    def _remote_case(
        self,
        prefix: str,
        one: Contender,
        section: str,
        run: Callable[..., Any],
        wanted: int | None,
        place: Place,
        server: Server,
    ) -> Case:
        far = place is server.far
        apart = None
        if not far and not self.settings.tiny:
            importing = 0.0 if one.kind == "bound" else import_seconds(one.modules, _GIVEN)
            apart = partial(apart_counts, partial(run, place=server.counted), importing)
        way = f"{prefix} {place.name}" if far else prefix
        return self._case(way, one, section, partial(run, place=place), wanted, (), apart)

    def _case(
        self,
        way: str,
        one: Contender,
        section: str,
        run: Callable[[Meter], Any],
        wanted: int | None,
        files: tuple[Path, ...],
        apart: Callable[[], Metrics] | None = None,
    ) -> Case:
        generates = wanted == self.tokens
        return Case(
            name=f"{way}, {one.name}",
            kind=one.kind,
            run=run,
            files=files,
            memory=self.nbytes * 3 // 2,
            digest=wanted,
            params={"contender": one.name, "generates": generates},
            against={"of_resident": _RESIDENT} if generates else {},
            section=section,
            apart=apart,
        )


def _tokens(one: Contender, meter: Meter, **arguments: Any) -> Any:
    _import(one)
    return loaders.tokens(meter, one.load, **arguments)


def _layer(one: Contender, meter: Meter, **arguments: Any) -> Any:
    _import(one)
    return loaders.first_layer(meter, one.load, **arguments)


def _receive(meter: Meter, place: Place, size: int) -> Any:
    for module in _BOTO3:
        importlib.import_module(module)
    return sockets.receive(meter, place, _KEYS["safetensors"], 0, size)


def _import(one: Contender) -> None:
    for module in one.modules:
        importlib.import_module(module)


def _importing(modules: tuple[str, ...]) -> Metrics:
    return {"import_seconds": import_seconds(modules, _GIVEN)} if modules else {}


def _url(one: Contender) -> str:
    return f"s3://{BUCKET}/{_KEYS[one.source]}"


def _digest_of(path: Path) -> int:
    import numpy as np

    value: int = in_child(lambda: digest(np.memmap(path, np.uint8, "r")), deadline=60)
    return value


def _forgets(path: Path) -> bool:
    """Whether the page cache lets go of a file where the files lie."""
    evict(path)
    return cached_share(path) < 0.05


def conclude(outcomes: Sequence[Outcome]) -> None:
    """How everybody does beside the best peer of the section: 2.0 is twice as fast."""
    for section in dict.fromkeys(outcome.case.section for outcome in outcomes):
        own = [one for one in outcomes if one.case.section == section and one.error is None]
        for metric, column in (("first_token_seconds", "first_of_best"), ("seconds", "all_of_best")):
            peers = [one for one in own if one.case.kind == "peer" and one.values(metric)]
            if not peers:
                continue
            best = min(peers, key=lambda one: one.median(metric) or 0.0)
            for one in own:
                for run, other in zip(one.runs, best.runs, strict=True):
                    if one.case.kind != "bound" and run and other and metric in run:
                        run[column] = other[metric] / run[metric]


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [one for one in outcomes if one.error is None]
    sections = list(dict.fromkeys(one.case.section for one in shown))
    if not sections:
        return
    for axes, section in zip(
        figure.subplots(-(-len(sections) // 2), 2, squeeze=False).flat, sections, strict=False
    ):
        ones = [one for one in shown if one.case.section == section][::-1]
        names = [one.case.params["contender"] for one in ones]
        colours = [COLOURS[one.case.kind] for one in ones]
        axes.barh(names, medians(ones, "seconds"), xerr=error_bars(ones, "seconds"), color=colours, alpha=0.4)
        axes.barh(names, medians(ones, "first_token_seconds"), color=colours)
        axes.set_title(section, fontsize=9)
        axes.set_xlabel("seconds: to the first token (dark), to all", fontsize=8)
        axes.tick_params(labelsize=6)
