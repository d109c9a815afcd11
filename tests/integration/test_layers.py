# SPDX-License-Identifier: Apache-2.0
"""A guest's memory as a layer on the one before: by the command line, touched everywhere, local and in S3."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem.cli import run
from lazymem.store import ahead

from .. import pagers
from ..children import check_child
from ..servers.s3 import Bucket

Capture = pytest.CaptureFixture[str]
CHUNK = 64 * 1024
CHUNKS = 400

#: Touch every page, by several threads and in another order than they lie; compare with the raw file.
TOUCH = """
    import sys, threading
    from pathlib import Path
    import numpy as np
    import lazymem

    whole = np.frombuffer(Path(sys.argv[1]).read_bytes(), np.uint8)
    for way in sys.argv[3:]:
        options = dict(pair.split("=") for pair in way.split())
        with lazymem.open(sys.argv[2], **options) as snap:
            data, wrong = snap["data"], []
            def touch(first):
                for page in range(len(whole) // 4096 - first, -1, -4):
                    part = slice(page * 4096, (page + 1) * 4096)
                    if not np.array_equal(data[part], whole[part]):
                        wrong.append(page)
            threads = [threading.Thread(target=touch, args=(i,)) for i in range(4)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert not wrong, wrong[:10]
            assert np.array_equal(data, whole)
            handle = snap.handle("data")
            assert np.array_equal(handle[-5:], whole[-5:])
            print(snap.backend, snap.stats().chunks_populated)
            del data
    """


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A folder with monday.mem and tuesday.mem, of which one chunk in 100 differs; a third are zeros."""
    rng = np.random.default_rng(5)
    monday = rng.integers(0, 256, (CHUNKS, CHUNK), np.uint8)
    monday[::3] = 0
    tuesday = monday.copy()
    for chunk in rng.choice(np.flatnonzero(np.arange(CHUNKS) % 3), CHUNKS // 100, replace=False):
        tuesday[chunk, 17] ^= 0xFF
    tuesday[9], tuesday[10] = monday[10], monday[11]
    tail = bytes(range(200)) * 10
    (tmp_path / "monday.mem").write_bytes(monday.tobytes() + tail)
    (tmp_path / "tuesday.mem").write_bytes(tuesday.tobytes() + tail)
    return tmp_path


def verb(capsys: Capture, *args: object, code: int = 0) -> tuple[str, str]:
    assert run([*map(str, args)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_layer_by_the_command_line_is_small_and_every_touch_of_it_is_right(
    guest: Path, capsys: Capture
) -> None:
    monday, tuesday = guest / "monday.lzm", guest / "tuesday.lzm"
    verb(capsys, "build", "--chunk-size", "64K", guest / "monday.mem", monday)
    assert verb(capsys, "build", "--base", monday, guest / "tuesday.mem", tuesday) == ("", "")
    own = tuesday.stat().st_size / monday.stat().st_size
    assert 0.01 < own < 0.03  # four chunks of 268, and 64 bytes for each of them
    ways = ("mode=r", "mode=c", "backend=eager")
    assert len(check_child(TOUCH, guest / "tuesday.mem", tuesday, *ways).splitlines()) == 3

    out, _ = verb(capsys, "info", tuesday)
    assert "base        monday.lzm, " in out
    facts = json.loads(verb(capsys, "info", "--json", tuesday)[0])
    assert facts["bases"][0]["url"] == "monday.lzm"
    assert facts["chunks"]["stored"] - facts["chunks"]["shared"] == CHUNKS // 100
    assert verb(capsys, "verify", tuesday)[0].startswith(f"{tuesday}: fine: ")
    verb(capsys, "extract", tuesday, guest / "out.mem")
    assert (guest / "out.mem").read_bytes() == (guest / "tuesday.mem").read_bytes()
    (guest / "away").mkdir()
    _, err = verb(capsys, "copy", tuesday, guest / "away")
    note = f"only the layer was copied; {guest}/away/tuesday.lzm needs its base monday.lzm beside it"
    assert err == f"lazymem: note: {note}\n"

    _, err = verb(capsys, "verify", guest / "away/tuesday.lzm", code=3)
    assert "is a layer, and its base 'monday.lzm' is not there" in err
    _, err = verb(capsys, "build", "--base", guest / "monday.mem", guest / "tuesday.mem", tuesday, code=3)
    assert "only a snapshot can be a base" in err
    verb(capsys, "build", "--chunk-size", "64K", guest / "tuesday.mem", monday)
    _, err = verb(capsys, "verify", tuesday, code=3)
    assert "is not the file that it was built on" in err


@pytest.mark.needs_userfaultfd
def test_pager_serves_a_layer(guest: Path) -> None:
    lazymem.build(guest / "monday.mem", guest / "monday.lzm", chunk_size=CHUNK)
    lazymem.build(guest / "tuesday.mem", guest / "tuesday.lzm", base=guest / "monday.lzm")
    with pagers.running(guest / "socket") as pager:
        out = check_child(TOUCH, guest / "tuesday.mem", guest / "tuesday.lzm", f"pager={pager.path}")
    assert out.startswith("pager ")


def test_layers_in_a_bucket_are_read_from_their_files(
    guest: Path, s3: Bucket, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, layer, third = (s3.url(key) for key in ("m/monday.lzm", "m/tuesday.lzm", "third.lzm"))
    lazymem.build(guest / "monday.mem", base, chunk_size=CHUNK)
    lazymem.build(guest / "tuesday.mem", layer, base=base)
    report = lazymem.build(guest / "monday.mem", third, base=layer)  # what tuesday changed is stored again
    assert report.file_bytes < 10 * CHUNK
    facts = json.loads(verb(capsys, "info", "--json", third)[0])
    assert [one["url"] for one in facts["bases"]] == ["m/tuesday.lzm", "m/monday.lzm"]
    check_child(TOUCH, guest / "monday.mem", third, "mode=r")
    monkeypatch.setattr(ahead, "PIECE", 3 * CHUNK)  # so that several are under way
    for url, name in (layer, "tuesday.mem"), (third, "monday.mem"):
        assert lazymem.verify(url).ok
        lazymem.extract(url, guest / "out.mem", overwrite=True)
        assert (guest / "out.mem").read_bytes() == (guest / name).read_bytes()

    _, err = verb(capsys, "build", "--base", base, guest / "tuesday.mem", guest / "local.lzm", code=2)
    assert "both must be local, or lie in one bucket" in err
    s3.put("m/monday.lzm", s3.get("m/tuesday.lzm"))
    for url in layer, third:
        _, err = verb(capsys, "verify", url, code=3)
        assert "is not the file that it was built on" in err
    s3.delete("m/monday.lzm")
    _, err = verb(capsys, "cat", layer, "data", code=3)
    assert "is a layer, and its base 'monday.lzm' is not there" in err
