# SPDX-License-Identifier: Apache-2.0
"""Layers: which chunks are reused, what section SRCS may say, and what becomes of a base that is another."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lazymem
from lazymem.builder import BuildReport
from lazymem.copier import copy
from lazymem.errors import (
    ChunkCorrupt,
    FormatError,
    LazymemError,
    OptionError,
    SnapshotChanged,
    SnapshotNotFound,
    UnsupportedFormat,
)
from lazymem.extractor import cat
from lazymem.format import layers, reader, structs
from lazymem.format.index import SnapshotIndex
from lazymem.format.layers import Base
from lazymem.format.reader import SnapshotReader, load_index
from lazymem.format.reuse import BaseChunks
from lazymem.opener import LocationOpener
from lazymem.options import StoreOptions
from lazymem.store.local import LocalBlob
from lazymem.summary import list_arrays, summarize

from .format_tools import MemoryBlob, parse, raw_sections, tail_fields, with_row, with_sections, with_tail

CHUNK = 1 << 16
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, CHUNK), np.uint8)


def memory(rows: list[int], last: int = 1000) -> bytes:
    """A guest's memory: chunks of noise, by number, -1 is zeros; and a short last one."""
    zeros = bytes(CHUNK)
    return b"".join(zeros if row < 0 else NOISE[row].tobytes() for row in rows) + NOISE[30][:last].tobytes()


def build(folder: Path, name: str, data: bytes, base: str | None = None, **options: Any) -> BuildReport:
    source = folder / f"{name}.mem"
    source.write_bytes(data)
    options.setdefault("chunk_size", None if base else CHUNK)
    if base is not None:
        options["base"] = folder / base
    return lazymem.build(source, folder / f"{name}.lzm", **options)


def index_of(path: Path) -> SnapshotIndex:
    with LocalBlob(path) as blob:
        return load_index(blob)


def content(path: Path) -> bytes:
    out = io.BytesIO()
    cat(path, "data", out)
    return out.getvalue()


BASE = memory([0, 1, -1, 2, 3])
NEXT = memory([3, -1, 10, 1, 1, 11])  # moved, twice, zeros elsewhere, and two that are new


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with base.lzm and its layer next.lzm."""
    build(tmp_path, "base", BASE)
    build(tmp_path, "next", NEXT, "base.lzm")
    return tmp_path


def test_layer_stores_only_what_its_base_lacks(pair: Path) -> None:
    index = index_of(pair / "next.lzm")
    assert index.records["source"].tolist() == [1, 0, 1, 1, 0, 1]  # the short last chunk, too
    assert index.chunk_size == CHUNK
    assert [base.url for base in index.sources] == ["base.lzm"]
    assert index.sources[0].size == (pair / "base.lzm").stat().st_size
    assert (pair / "next.lzm").stat().st_size < 2 * CHUNK + 4096
    assert content(pair / "next.lzm") == NEXT
    report = lazymem.verify(pair / "next.lzm")
    assert (report.ok, report.digest_ok, report.stored_chunks) == (True, True, 6)
    lazymem.extract(pair / "next.lzm", pair / "out.mem")
    assert (pair / "out.mem").read_bytes() == NEXT


def test_layer_has_the_digest_of_a_whole_snapshot(pair: Path) -> None:
    (pair / "there").mkdir()
    whole = lazymem.build(pair / "next.mem", pair / "there/whole.lzm", chunk_size=CHUNK, codec="lz4")
    again = lazymem.build(pair / "next.lzm", pair / "there/again.lzm", chunk_size=CHUNK)
    assert whole.digest == again.digest == index_of(pair / "next.lzm").digest.hex()
    assert not index_of(pair / "there/again.lzm").sources
    assert (whole.shared_chunks, again.shared_chunks) == (0, 0)


def test_layer_is_told_from_other_files_by_its_feature_bit_and_nothing_else_changes(pair: Path) -> None:
    for name, minor, bits in (("base", structs.MINOR, 0), ("next", structs.MINOR_LAYERS, structs.LAYERS)):
        data = (pair / f"{name}.lzm").read_bytes()
        head = structs.HEAD.unpack(data[: structs.HEAD.size])
        for fields in (head, tail_fields(data)):
            assert (fields["minor"], fields["incompatible"]) == (minor, bits)
    assert json.loads(raw_sections(data)["FEAT"]) == ["layers"]
    with pytest.MonkeyPatch.context() as patch:  # as version 1.0 was
        patch.setattr(structs, "KNOWN_INCOMPATIBLE", 0)
        with pytest.raises(UnsupportedFormat, match="layers"):
            parse(data)


@pytest.mark.parametrize(
    "codecs", [("zstd", "none"), ("none", "zstd"), ("none", "none"), ("lz4", "zstd")], ids="-".join
)
def test_reused_records_keep_their_codec_and_filter(tmp_path: Path, codecs: tuple[str, str]) -> None:
    numbers = RNG.standard_normal(CHUNK).astype(np.float32)  # four chunks
    changed = np.concatenate([np.full(CHUNK // 4, 7, np.float32), numbers[CHUNK // 4 :], numbers[:100]])
    base, layer = tmp_path / "a.lzm", tmp_path / "b.lzm"
    lazymem.build({"x": numbers}, base, chunk_size=CHUNK, codec=codecs[0], planes=True)
    lazymem.build({"y": changed}, layer, codec=codecs[1], base=base)
    old, new = index_of(base).records, index_of(layer).records
    assert new["source"].tolist() == [0, 1, 1, 1, 0]
    same = ["offset", "stored_length", "codec", "filter", "width", "checksum"]
    assert np.array_equal(new[same][1:4], old[same][1:])
    assert lazymem.verify(layer).ok
    for backend in ("auto", "eager"):
        with lazymem.open(layer, backend=backend) as snap:
            assert snap.backend != "map"
            assert np.array_equal(snap.read("y"), changed)
    with lazymem.open(layer, dtype="float16") as snap:  # composed of both files
        assert np.array_equal(snap.read("y"), changed.astype(np.float16))
    with pytest.raises(lazymem.BackendUnavailable, match="layer"):
        lazymem.open(layer, backend="map")


def test_short_last_chunk_is_reused_only_for_its_own_bytes(tmp_path: Path) -> None:
    build(tmp_path, "base", memory([0]))
    build(tmp_path, "longer", memory([0, 30], 0), "base.lzm")  # whole: begins as the base's last
    build(tmp_path, "shorter", memory([0], 999), "base.lzm")
    build(tmp_path, "padded", memory([0]) + bytes(CHUNK), "base.lzm")  # zeros follow it in its chunk
    for name in ("longer", "shorter", "padded"):
        assert index_of(tmp_path / f"{name}.lzm").records["source"].tolist() == [1, 0]
        assert content(tmp_path / f"{name}.lzm") == (tmp_path / f"{name}.mem").read_bytes()


def test_layer_without_anything_in_common_is_right(tmp_path: Path) -> None:
    build(tmp_path, "base", BASE)
    report = build(tmp_path, "other", memory([20, 21], 5), "base.lzm")
    assert report.shared_chunks == 0
    assert len(index_of(tmp_path / "other.lzm").sources) == 1
    assert content(tmp_path / "other.lzm") == memory([20, 21], 5)
    report = lazymem.build({"zeros": np.zeros(CHUNK)}, tmp_path / "z.lzm", base=tmp_path / "base.lzm")
    assert report.chunks == report.zero_chunks
    with lazymem.open(tmp_path / "z.lzm") as snap:
        assert not snap["zeros"].any()


def test_layer_of_a_layer_names_all_files_it_uses(pair: Path) -> None:
    build(pair, "third", memory([11, 3, 20, 10, 2], 1000), "next.lzm")
    third = index_of(pair / "third.lzm")
    assert [base.url for base in third.sources] == ["next.lzm", "base.lzm"]
    # Chunk 2 of the base is in no record of the layer between them, so it is stored again.
    assert third.records["source"].tolist() == [1, 2, 0, 1, 0, 2]
    assert content(pair / "third.lzm") == (pair / "third.mem").read_bytes()
    assert lazymem.verify(pair / "third.lzm").ok
    # What is not used is not needed: nothing of base.lzm but the direct base.
    build(pair, "fourth", memory([10, 21], 7), "third.lzm")
    fourth = index_of(pair / "fourth.lzm")
    assert [base.url for base in fourth.sources] == ["third.lzm", "next.lzm"]
    assert fourth.records["source"].tolist() == [2, 0, 0]
    build(pair, "fifth", memory([3, 21], 7), "third.lzm")
    fifth = index_of(pair / "fifth.lzm")
    assert [base.url for base in fifth.sources] == ["third.lzm", "base.lzm"]
    (pair / "next.lzm").rename(pair / "away")
    assert content(pair / "fifth.lzm") == (pair / "fifth.mem").read_bytes()
    (pair / "away").rename(pair / "next.lzm")
    (pair / "base.lzm").unlink()
    assert content(pair / "fourth.lzm") == (pair / "fourth.mem").read_bytes()


def test_chunk_is_reused_by_its_whole_digest(pair: Path) -> None:
    with LocalBlob(pair / "base.lzm") as blob:
        chunks = BaseChunks(SnapshotReader(blob), str(pair / "x.lzm"))
    for row, offset in zip(NOISE[:2], index_of(pair / "base.lzm").records["offset"], strict=False):
        digest = hashlib.sha256(row).digest()
        record = chunks.find(digest)
        assert record is not None
        assert (np.frombuffer(record, structs.CHUNK.dtype)["offset"], record[16]) == (offset, 1)
        assert (
            chunks.find(digest[:-1] + bytes([digest[-1] ^ 1])) is None
        )  # what is looked up first is the same
        assert chunks.find(bytes(32)) is chunks.find(b"\xff" * 32) is None


class RemoteBlob(MemoryBlob):
    """Counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return super().read(offset, length)


def test_files_of_a_remote_layer_are_read_ahead_each_for_its_own_chunks(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, base = (RemoteBlob((pair / f"{name}.lzm").read_bytes()) for name in ("next", "base"))
    monkeypatch.setattr(reader, "open_bases", lambda index, opener: (base,))
    source = SnapshotReader(layer, LocationOpener(StoreOptions()))
    del layer.reads[:], base.reads[:]
    with source.ahead([(0, len(NEXT) - 500), (len(NEXT) - 500, 500)]):
        assert b"".join(source.read_range(0, len(NEXT))) == NEXT
    rows = source.index.records[["offset", "stored_length", "source"]].tolist()
    assert layer.reads == [(64, 2 * CHUNK)]  # neighbours
    assert sorted(base.reads) == sorted((at, length) for at, length, number in rows if number)


def test_chain_of_layers_ends_with_a_clear_error(tmp_path: Path) -> None:
    build(tmp_path, "0", memory([0], 1))
    for i in range(1, structs.MAX_BASES + 1):  # each keeps a chunk of all before
        build(tmp_path, str(i), memory(list(range(i + 1)), 1), f"{i - 1}.lzm")
    last = index_of(tmp_path / f"{structs.MAX_BASES}.lzm")
    assert [base.url for base in last.sources] == [f"{i}.lzm" for i in range(structs.MAX_BASES)][::-1]
    assert content(tmp_path / f"{structs.MAX_BASES}.lzm") == memory(list(range(structs.MAX_BASES + 1)), 1)
    with pytest.raises(OptionError, match=r"16.*without --base"):
        build(tmp_path, "more", memory([0]), f"{structs.MAX_BASES}.lzm")
    assert not (tmp_path / "more.lzm").exists()


def test_base_is_named_from_where_the_layer_lies(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair / "sub").mkdir()
    monkeypatch.chdir(pair)
    lazymem.build("next.mem", "sub/far.lzm", base="base.lzm")
    (base,) = index_of(pair / "sub/far.lzm").sources
    assert base.url == str(pair / "base.lzm")  # not "..": it would be another file after a move
    (pair / "base.lzm").rename(pair / "sub/base.lzm")
    lazymem.build("next.mem", "near.lzm", base="sub/base.lzm")
    (base,) = index_of(pair / "near.lzm").sources
    assert base.url == "sub/base.lzm"
    (pair / "moved").mkdir()
    (pair / "sub").rename(pair / "moved/sub")
    (pair / "near.lzm").rename(pair / "moved/near.lzm")
    assert content(Path("moved/near.lzm")) == NEXT
    monkeypatch.chdir("moved")
    assert content(Path("near.lzm")) == NEXT


# ---- a base that is not there, or another ----


def uses(path: Path) -> list[Any]:
    """What must open the base: all that read the layer's bytes."""
    folder = path.parent
    return [
        lambda: lazymem.open(path),
        lambda: lazymem.verify(path),
        lambda: content(path),
        lambda: lazymem.extract(path, folder / "out"),
        lambda: lazymem.build(path, folder / "again.lzm"),
        lambda: lazymem.build(folder / "next.mem", folder / "again.lzm", base=path),
    ]


def test_missing_base_is_named(pair: Path) -> None:
    (pair / "base.lzm").unlink()
    for use in uses(pair / "next.lzm"):
        with pytest.raises(SnapshotNotFound, match=r"next\.lzm: is a layer, and its base 'base\.lzm' is not"):
            use()
    assert len(list_arrays(pair / "next.lzm")) == 1  # these need only the index
    assert summarize(pair / "next.lzm").bases[0].url == "base.lzm"
    assert not (pair / "again.lzm").exists()
    assert not (pair / "out").exists()


def test_another_base_is_refused(pair: Path) -> None:
    good = (pair / "base.lzm").read_bytes()
    build(pair, "other", memory([0, 1, -1, 2, 4]))
    other = (pair / "other.lzm").read_bytes()
    # Of the same content, but stored elsewhere: only the index tells.
    moved = with_sections(good, lambda s: s.update(TOOL=s["TOOL"].replace(b"lazymem", b"lazymen")))
    assert len(moved) == len(good)
    assert parse(moved).digest == parse(good).digest
    for data in (other, moved, good[:-1], good + b"\0", b"", bytes(len(good)), bytes(100)):
        (pair / "base.lzm").write_bytes(data)
        for use in uses(pair / "next.lzm"):
            with pytest.raises(
                SnapshotChanged, match=r"next\.lzm: is a layer on 'base\.lzm', and .*base\.lzm is"
            ):
                use()
    (pair / "base.lzm").write_bytes(good)
    assert content(pair / "next.lzm") == NEXT


def test_damage_in_a_base_is_found_where_it_lies(pair: Path) -> None:
    index = index_of(pair / "next.lzm")
    offset = int(index.records["offset"][0])
    data = bytearray((pair / "base.lzm").read_bytes())
    data[offset + 100] ^= 1
    (pair / "base.lzm").write_bytes(data)
    for deep in (True, False):
        report = lazymem.verify(pair / "next.lzm", deep=deep)
        assert [(bad.chunk, bad.offset, bad.base) for bad in report.bad] == [
            (0, offset, str(pair / "base.lzm"))
        ]
    with pytest.raises(ChunkCorrupt, match=r"next\.lzm: chunk 0 \(offset in its base .*base\.lzm: "):
        content(pair / "next.lzm")
    with lazymem.open(pair / "next.lzm") as snap, pytest.raises(ChunkCorrupt):
        snap.prefetch(wait=True)


# ---- what is refused at build ----


def test_build_refuses_what_cannot_be_a_base(pair: Path) -> None:
    def refused(
        kind: type[LazymemError], match: str, base: str | Path, name: str = "x.lzm", **more: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            lazymem.build(pair / "next.mem", pair / name, base=base, **more)
        assert not (pair / "x.lzm").exists()

    refused(FormatError, "only a snapshot can be a base", pair / "base.mem")
    refused(FormatError, "only a snapshot can be a base", pair)
    refused(SnapshotNotFound, "gone", pair / "gone.lzm")
    refused(OptionError, f"base has chunks of {CHUNK} bytes", pair / "base.lzm", chunk_size=2 * CHUNK)
    refused(OptionError, "is the base", pair / "base.lzm", "base.lzm")
    refused(OptionError, "is the base, or what that stands on", pair / "next.lzm", "base.lzm", overwrite=True)
    (pair / "new\nline.lzm").write_bytes((pair / "base.lzm").read_bytes())
    refused(OptionError, "cannot be printed", pair / "new\nline.lzm")
    data = (pair / "base.lzm").read_bytes()
    broken = bytearray(data)
    broken[parse(data).cold["CDIG"].offset] ^= 1
    (pair / "broken.lzm").write_bytes(broken)
    refused(FormatError, "CDIG", pair / "broken.lzm")
    assert (pair / "base.lzm").read_bytes() == data


def test_build_refuses_a_base_whose_digests_are_false(tmp_path: Path) -> None:
    """Else a layer would show the chunks of a forged base in place of its own."""
    build(tmp_path, "base", memory([0, 1], 0))
    data = (tmp_path / "base.lzm").read_bytes()
    swapped = raw_sections(data)["CHNK"]
    size = structs.CHUNK.size
    forged = with_sections(data, lambda s: s.update(CHNK=swapped[size:] + swapped[:size]))
    (tmp_path / "base.lzm").write_bytes(forged)
    build(tmp_path, "layer", memory([0, 1], 0), "base.lzm")
    assert not lazymem.verify(tmp_path / "layer.lzm").ok  # what `verify` is for
    (tmp_path / "base.lzm").write_bytes(with_tail(data, digest=bytes(32)))
    with pytest.raises(FormatError, match="CDIG"):
        build(tmp_path, "layer", memory([0, 1], 0), "base.lzm")


# ---- what a hostile file may say ----

GOOD = {"url": "base.lzm", "digest": "0" * 64, "size": 10 * CHUNK, "index": "0" * 16}


@pytest.mark.parametrize(
    "value",
    [
        [7], [[]], [{}], [GOOD | {"more": 1}], [{k: v for k, v in GOOD.items() if k != "index"}], [GOOD] * 17,
        *([GOOD | {"url": url}] for url in (
            "", None, 7, "..", "../base.lzm", "a/../../b", "a//b", "./b", "a\\b", "a\0b", "a\nb", "x" * 5000,
            "file:///etc/passwd", "/etc\n", "s3://user:secret@bucket/a", "https://host/a?sig=secret",
        )),
        *([GOOD | {"digest": digest}] for digest in ("0" * 63, "G" * 64, "A" * 64, None, 7)),
        *([GOOD | {"index": index}] for index in ("0" * 15, "-" + "0" * 15, None)),
        *([GOOD | {"size": size}] for size in (-1, 0, 100, 1 << 63, 10**40, 1e6, True, None, "9")),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_parse_refuses_bases_that_cannot_be(pair: Path, value: Any) -> None:
    data = (pair / "next.lzm").read_bytes()
    with pytest.raises(FormatError, match="SRCS"):
        parse(with_sections(data, lambda s: s.update(SRCS=json.dumps(value).encode())))


def test_parse_refuses_records_and_features_that_do_not_agree(pair: Path) -> None:
    data = (pair / "next.lzm").read_bytes()
    size = (pair / "base.lzm").stat().st_size
    for changed in (
        with_row(data, "CHNK", 0, source=2),
        with_row(data, "CHNK", 0, source=65535),
        with_row(data, "CHNK", 0, offset=size),
        with_row(data, "CHNK", 0, offset=0),
        with_row(data, "CHNK", 0, offset=2**64 - 1),
        with_row(data, "CHNK", 0, offset=int(parse(data).records["offset"][2]) + 1),  # of one source: overlap
        with_sections(data, lambda s: s.pop("SRCS")),
        with_sections(data, lambda s: s.update(SRCS=b"[]")),
        with_tail(data, incompatible=0),
    ):
        with pytest.raises(FormatError):
            parse(changed)
    # Within record 1, but of another file: no overlap.
    assert parse(with_row(data, "CHNK", 5, offset=int(parse(data).records["offset"][1]) + 100))


@pytest.mark.parametrize(
    ("layer", "url", "found"),
    [
        ("a/l.lzm", "b.lzm", "a/b.lzm"),
        ("l.lzm", "b/c.lzm", "b/c.lzm"),
        ("/a/l.lzm", "/b/c.lzm", "/b/c.lzm"),
        ("s3://bucket/a/l.lzm", "b.lzm", "s3://bucket/a/b.lzm"),
        ("s3://bucket/a/l.lzm", "s3://bucket/c.lzm", "s3://bucket/c.lzm"),
        ("https://host/a/l.lzm", "b c/d?.lzm", "https://host/a/b%20c/d%3F.lzm"),
        ("https://host/l.lzm", "https://HOST/b.lzm", "https://HOST/b.lzm"),
        ("s3://bucket/l.lzm", "/etc/passwd", None),
        ("s3://bucket/l.lzm", "s3://other/c.lzm", None),
        ("https://host/l.lzm", "https://host:444/c.lzm", None),
        ("https://host/l.lzm", "http://host/c.lzm", None),
        ("https://host/l.lzm", "http://169.254.169.254/latest", None),
        ("https://host/l.lzm", "/etc/passwd", None),
        ("/a/l.lzm", "s3://bucket/c.lzm", None),
        ("/a/l.lzm", "http://localhost/c.lzm", None),
    ],
)
def test_layer_leads_to_its_own_store_only(layer: str, url: str, found: str | None) -> None:
    base = Base(**GOOD | {"url": url})  # type: ignore[arg-type]
    if found is not None:
        assert layers.resolve(layer, base) == found
        return
    with pytest.raises(FormatError, match="own store"):
        layers.resolve(layer, base)
    with pytest.raises(OptionError, match="both must be local, or lie in one bucket"):
        layers.name_for(layer, url)


def test_hostile_layer_has_no_foreign_file_read(pair: Path) -> None:
    data = (pair / "next.lzm").read_bytes()
    bases = json.loads(raw_sections(data)["SRCS"])
    for url in ("s3://bucket/a.lzm", "http://127.0.0.1:1/a.lzm"):
        bases[0]["url"] = url
        (pair / "next.lzm").write_bytes(
            with_sections(data, lambda s: s.update(SRCS=json.dumps(bases).encode()))
        )
        for use in uses(pair / "next.lzm"):
            with pytest.raises(FormatError, match="own store"):
                use()


# ---- the rest of the house ----


def test_copy_of_a_layer_copies_the_layer_alone(pair: Path) -> None:
    (pair / "there").mkdir()
    report = copy(pair / "next.lzm", pair / "there")
    assert (report.bases, report.checked) == (("base.lzm",), 2)
    assert (pair / "there/next.lzm").read_bytes() == (pair / "next.lzm").read_bytes()
    with pytest.raises(SnapshotNotFound):
        lazymem.open(pair / "there/next.lzm")
    assert copy(pair / "base.lzm", pair / "there").bases == ()
    assert content(pair / "there/next.lzm") == NEXT
    lazymem.build(pair / "next.mem", pair / "there/far.lzm", base=pair / "base.lzm")
    with pytest.raises(OptionError, match="cannot be used from s3://bucket/x"):
        copy(pair / "there/far.lzm", "s3://bucket/x", overwrite=True, storage_options={"anonymous": True})


def test_summary_of_a_layer_says_what_it_stands_on(pair: Path) -> None:
    summary = summarize(pair / "next.lzm")
    base = index_of(pair / "next.lzm").sources[0]
    assert [replace(base, url=one.url, size=one.size, digest=one.digest) for one in summary.bases] == [base]
    assert summary.chunks is not None
    assert (summary.chunks.stored, summary.chunks.shared, summary.chunks.zero) == (6, 4, 1)
    assert summary.chunks.stored_bytes == 2 * CHUNK
    whole = summarize(pair / "base.lzm")
    assert whole.bases == ()
    assert whole.chunks is not None
    assert whole.chunks.shared == 0
