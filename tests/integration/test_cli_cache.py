# SPDX-License-Identifier: Apache-2.0
"""`lazymem cache`: what it says and what it removes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lazymem.cache import ChunkCache
from lazymem.cli import run

Capture = pytest.CaptureFixture[str]
HOUR = 3600


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ten pieces of 60 KiB on the disk, each an hour older than the next; the default one."""
    path = tmp_path / "cache"
    monkeypatch.setenv("LAZYMEM_CACHE_DIR", str(path))
    monkeypatch.delenv("LAZYMEM_CACHE_SIZE", raising=False)
    cache = ChunkCache(str(path), 1 << 30)
    key = cache.object_key("s3://bucket/key", "1", 1)
    for number in range(10):
        cache.write(key, number, os.urandom(60_000))
    for number, piece in enumerate(sorted(path.glob("v1/*/*"))):
        os.utime(piece, (time.time() - HOUR * (number + 3),) * 2)
    return path


def pieces(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("v1/*/*"))


def test_info_says_what_is_in_it(directory: Path, capsys: Capture) -> None:
    assert run(["cache", "info"]) == 0
    assert capsys.readouterr().out.split("\n") == [
        str(directory),
        "  pieces      10 pieces of 1 object",
        "  size        600 KiB of 16 GiB",
        "  last used   3 hours ago; the oldest 12 hours ago",
        "",
    ]


def test_info_as_json_has_every_number(
    directory: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYMEM_CACHE_SIZE", "5000000")
    assert run(["cache", "info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("directory", "objects", "pieces", "bytes", "max_bytes")} == {
        "directory": str(directory),
        "objects": 1,
        "pieces": 10,
        "bytes": 10 * 61440,
        "max_bytes": 5_000_000,
    }
    assert found["newest"] - found["oldest"] == pytest.approx(9 * HOUR, abs=60)


def test_info_of_a_directory_that_is_not_there_is_empty_and_makes_nothing(
    tmp_path: Path, capsys: Capture
) -> None:
    assert run(["cache", "info", "--dir", str(tmp_path / "none")]) == 0
    assert "0 pieces of 0 objects" in capsys.readouterr().out
    assert run(["cache", "prune", "--dir", str(tmp_path / "none")]) == 0
    assert "removed 0 files, 0 B; 0 pieces, 0 B are left" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_default_directory_is_in_the_home(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAZYMEM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["cache", "info"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/.cache/lazymem\n")


def test_info_mentions_what_writers_left(directory: Path, capsys: Capture) -> None:
    folder = next(directory.glob("v1/*/*")).parent
    (folder / "0-ea60.0123456789ab.tmp").touch()
    assert run(["cache", "info"]) == 0
    assert "unfinished  1 file\n" in capsys.readouterr().out


def test_prune_keeps_what_was_used_last(directory: Path, capsys: Capture) -> None:
    assert run(["cache", "prune", "--max-size", "300K"]) == 0
    assert capsys.readouterr().out == (f"{directory}: removed 5 files, 300 KiB; 5 pieces, 300 KiB are left\n")
    assert pieces(directory) == [f"{number}-ea60" for number in range(5)]


def test_prune_without_a_size_keeps_to_the_limit(
    directory: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["cache", "prune", "--quiet"]) == 0
    assert len(pieces(directory)) == 10
    monkeypatch.setenv("LAZYMEM_CACHE_SIZE", str(130_000))
    assert run(["cache", "prune", "--quiet"]) == 0
    assert pieces(directory) == ["0-ea60", "1-ea60"]
    assert capsys.readouterr() == ("", "")


def test_prune_all_empties_it(directory: Path, capsys: Capture) -> None:
    assert run(["cache", "prune", "--all"]) == 0
    assert "10 files" in capsys.readouterr().out
    assert pieces(directory) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prune", "--all", "--max-size", "1M"], 2, "exclude each other"),
        (["prune", "--max-size", "lots"], 2, "not a size"),
        (["info", "--dir", "/dev/null"], 2, "is not a directory"),
        (["info", "--dir", ""], 2, "must be a directory"),
        (["empty"], 2, "No such command"),
    ],
)
def test_wrong_call_is_one_sentence(arguments: list[str], code: int, says: str, capsys: Capture) -> None:
    assert run(["cache", *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("lazymem: ")
    assert says in err
    assert err.count("\n") == 1


def test_directory_that_is_not_safe_is_one_sentence(directory: Path, capsys: Capture) -> None:
    os.chmod(directory / "v1", 0o777)
    for verb in ("info", "prune"):
        assert run(["cache", verb]) == 2
        assert "may be written to by others (mode 777); `chmod go-w" in capsys.readouterr().err
    assert len(pieces(directory)) == 10
