# SPDX-License-Identifier: Apache-2.0
"""Packets, sources and their lanes, and the command that starts the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazymem import _native
from lazymem.errors import LazymemError, OptionError, ReadError
from lazymem.fetcher import messages
from lazymem.fetcher.command import command
from lazymem.fetcher.job import parts_of
from lazymem.fetcher.messages import BadMessage, Piece
from lazymem.fetcher.sources import Sources, cache_name
from lazymem.options import StoreOptions
from lazymem.store.base import Opened

from .fetcher_tools import pack_ask, pack_pieces, read_answer


def told(url: str, size: Any = None, identity: Any = None, **options: Any) -> bytes:
    given = StoreOptions(**options).to_json()
    return json.dumps({"url": url, "options": given, "size": size, "identity": identity}).encode()


# ---- packets ----


def test_question_is_unpacked_as_it_was_packed() -> None:
    packet = pack_ask(messages.RANGE, 77, source=5, offset=1 << 40, length=1000, place=4096, timeout=1.5,
                      demand=True, payload=pack_pieces((1 << 40, 600), ((1 << 40) + 600, 400)))  # fmt: skip
    ask = messages.unpack(packet)
    assert (ask.kind, ask.id, ask.source, ask.offset) == (messages.RANGE, 77, 5, 1 << 40)
    assert (ask.length, ask.place, ask.timeout, ask.demand, ask.refetch) == (1000, 4096, 1.5, True, False)
    assert messages.pieces_of(ask) == [Piece(1 << 40, 600), Piece((1 << 40) + 600, 400)]


@pytest.mark.parametrize("cut", [0, 1, 55])
def test_packet_that_is_too_short_is_refused(cut: int) -> None:
    with pytest.raises(BadMessage):
        messages.unpack(pack_ask(messages.STATUS, 1)[:cut])


@pytest.mark.parametrize(
    "packet", [pack_ask(messages.OPEN, 1) + b"x", pack_ask(messages.OPEN, payload=b"ab")[:-1]]
)
def test_packet_whose_payload_has_another_length_is_refused(packet: bytes) -> None:
    with pytest.raises(BadMessage):
        messages.unpack(packet)


def test_range_without_pieces_is_one() -> None:
    ask = messages.unpack(pack_ask(messages.RANGE, offset=5, length=10))
    assert messages.pieces_of(ask) == [Piece(5, 10)]


def test_empty_pieces_do_not_count() -> None:
    ask = messages.unpack(pack_ask(messages.RANGE, offset=5, length=10, payload=pack_pieces((5, 0), (5, 10))))
    assert messages.pieces_of(ask) == [Piece(5, 10)]


def test_answer_fits_in_what_the_engine_keeps() -> None:
    ask = messages.unpack(pack_ask(messages.RANGE, 9))
    answer = read_answer(messages.failed(ask, _native.E_STORE, "ö" * 10_000, requests=1 << 40))
    assert len(answer.text.encode()) == messages.TEXT_MAX < 4095
    assert answer.requests == 0xFFFFFFFF


def test_errors_that_are_no_kind_of_their_own_are_the_stores() -> None:
    for error in (ReadError("x", url="u"), LazymemError("x"), ValueError("x")):
        assert messages.code_of(error) == _native.E_STORE


def test_parts_bridge_small_holes_only() -> None:
    pieces = [Piece(0, 10), Piece(10, 10), Piece(30, 10), Piece(51, 9)]
    assert parts_of(pieces, 10) == [Piece(0, 40), Piece(51, 9)]
    assert parts_of(pieces, 0) == [Piece(0, 20), Piece(30, 10), Piece(51, 9)]
    assert parts_of([], 10) == []


# ---- sources ----


def test_source_keeps_its_reader_when_its_version_is_told() -> None:
    sources = Sources()
    assert sources.tell(1, told("s3://bucket/key")) is None
    source = sources.get(1)
    assert source.opened is None
    assert sources.tell(1, told("s3://bucket/key", 10, '"e"')) is None
    assert sources.get(1) is source
    assert source.opened == Opened(10, '"e"', b"")


def test_number_that_means_another_object_gives_the_former_back() -> None:
    sources = Sources()
    sources.tell(1, told("s3://bucket/key"))
    before = sources.get(1)
    assert sources.tell(1, told("s3://bucket/other")) is before
    assert sources.get(1).url == "s3://bucket/other"
    assert sources.forget(1) is not before
    assert sources.forget(1) is None


def test_shards_of_one_model_share_a_lane() -> None:
    sources = Sources()
    for number in range(3):
        sources.tell(number, told(f"s3://bucket/model-{number}"))
    sources.tell(3, told("s3://other/model"))
    sources.tell(4, told("s3://bucket/model-0", region="eu-west-1"))
    lanes = [sources.get(number).lane for number in range(5)]
    assert lanes[0] is lanes[1] is lanes[2]
    assert len({id(lane) for lane in lanes}) == 3
    for number in range(5):
        sources.forget(number)
    sources.tell(9, told("s3://bucket/model-1"))
    assert sources.get(9).lane is lanes[0]


def test_lanes_that_nobody_uses_do_not_pile_up() -> None:
    sources = Sources()
    for number in range(100):
        sources.tell(1, told(f"s3://bucket-{number}/key"))
    sources.tell(2, told("s3://bucket/key"))
    kept = sources.get(2).lane
    for number in range(100, 200):
        sources.tell(1, told(f"s3://bucket-{number}/key"))
    assert len(sources.lanes()) <= 12
    assert kept in sources.lanes()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"url": "s3://b/k"}',
        b'{"url": "s3://b/k", "options": [], "size": null, "identity": null}',
        b'{"url": "s3://b/k", "options": {"secret_word": "hush"}, "size": null, "identity": null}',
        b'{"url": "s3://b/k", "options": {"client": "hush"}, "size": null, "identity": null}',
        b'{"url": 5, "options": {}, "size": null, "identity": null}',
        b'{"url": "s3://b/k", "options": {}, "size": -1, "identity": "e"}',
        b'{"url": "s3://b/k", "options": {}, "size": 1, "identity": 3}',
        told("s3://b/k", 1 << 70, "e").replace(b"1180591620717411303424", b'"big"'),
    ],
)
def test_source_told_of_in_odd_words_is_refused_when_it_is_asked_for(payload: bytes) -> None:
    sources = Sources()
    sources.tell(1, payload)
    with pytest.raises(OptionError):
        sources.get(1)


def test_cache_name_tells_places_apart_and_signatures_not() -> None:
    def name(url: str, identity: str = '"e"', **options: Any) -> str:
        return cache_name(url, StoreOptions(**options), identity)

    key = "s3://bucket/key"
    assert name(key) == name(key, region="eu-west-1", timeout=3.0)
    others = {
        name(key),
        name(key, endpoint_url="http://localhost:9000"),
        name(key, profile="work"),
        name(key, environment={"AWS_ENDPOINT_URL": "http://localhost:9000"}),
        name(key, environment={"AWS_ENDPOINT_URL_S3": "http://localhost:9000"}),
        name(key, environment={"AWS_PROFILE": "work"}),
    }
    assert len(others) == 6
    signed = "https://host/path?X-Amz-Signature={}"
    assert name(signed.format("a")) == name(signed.format("b")) == "https://host/path"
    assert name(signed.format("a"), "last-modified:x") != name(signed.format("b"), "last-modified:x")
    assert name("https://host/get?id=1") != name("https://host/get?id=2")


# ---- command ----


def test_command_finds_modules_where_this_process_does_but_not_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the script')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    argv = command()
    assert argv[0] == sys.executable
    assert "" not in argv[6:]
    # Descriptors 3 and 4 are not there, so it ends at once; not for a module that cannot be found.
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Bad file descriptor" in done.stderr or not done.stderr


def test_command_needs_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OptionError, match=r"sys\.executable"):
        command()


def test_process_imports_neither_numpy_nor_a_client() -> None:
    argv = command()
    code = argv[4].replace("main()", "print(*sorted(sys.modules))")
    done = subprocess.run([*argv[:4], code, *argv[5:]], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "lazymem" in loaded
    assert not loaded & {"numpy", "botocore", "boto3", "obstore", "urllib3", "asyncio"}
