# SPDX-License-Identifier: Apache-2.0
"""The cache on disk: right bytes or none, whatever happens to its files, its disk and its processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.cache import CacheCounters, ChunkCache, open_cache, piece
from lazymem.errors import OptionError
from lazymem.options import StoreOptions

from ..children import check_child, run_child

URL = "https://host.example/bucket/key-of-the-object"
ETAG = '"1234-5"'
KEY = ChunkCache.object_key(URL, ETAG, 1000)
OTHER = ChunkCache.object_key(URL, '"other"', 1000)
DATA = bytes(random.Random(7).randbytes(40))
LIMIT = 1 << 20
HOUR = 3600


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ChunkCache]:
    cache = ChunkCache(str(tmp_path / "cache"), LIMIT)
    yield cache
    cache.close()


def read(cache: ChunkCache, offset: int, length: int, key: str = KEY) -> bytes | None:
    out = bytearray(length)
    return bytes(out) if cache.read_into(key, offset, memoryview(out)) else None


def files(cache: ChunkCache) -> list[Path]:
    return sorted(path for path in Path(cache.directory, "v1").glob("*/*"))


def the_file(cache: ChunkCache) -> Path:
    (path,) = files(cache)
    return path


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- what it is for ----


def test_piece_comes_back_in_this_and_in_another_instance(cache: ChunkCache) -> None:
    assert read(cache, 512, len(DATA)) is None
    cache.write(KEY, 512, DATA)
    assert read(cache, 512, len(DATA)) == DATA
    assert read(ChunkCache(cache.directory, LIMIT), 512, len(DATA)) == DATA
    assert read(cache, 512, len(DATA)) == DATA
    assert cache.counters() == CacheCounters(hits=2, misses=1, written=1)


def test_read_fills_just_the_given_bytes(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA)
    whole = bytearray(b"-" * 60)
    assert cache.read_into(KEY, 0, memoryview(whole)[10:50])
    assert whole == b"-" * 10 + DATA + b"-" * 10


@pytest.mark.parametrize(("key", "offset", "length"), [(OTHER, 0, 40), (KEY, 1, 40), (KEY, 0, 39)])
def test_another_piece_is_a_miss(cache: ChunkCache, key: str, offset: int, length: int) -> None:
    cache.write(KEY, 0, DATA)
    assert read(cache, offset, length, key) is None
    assert read(cache, 0, 40) == DATA


def test_pieces_of_one_offset_and_two_lengths_live_side_by_side(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA)
    cache.write(KEY, 0, DATA[:7])
    assert (read(cache, 0, 40), read(cache, 0, 7)) == (DATA, DATA[:7])


def test_directory_that_another_process_made_is_found(cache: ChunkCache) -> None:
    ChunkCache(cache.directory, LIMIT).write(KEY, 0, DATA)
    assert read(cache, 0, 40) == DATA


def test_empty_pieces_are_not_kept(cache: ChunkCache) -> None:
    cache.write(KEY, 0, b"")
    assert read(cache, 0, 0) is None
    assert not Path(cache.directory).exists()


def test_object_key_differs_with_everything_that_tells_versions_apart() -> None:
    keys = {
        ChunkCache.object_key(*given)
        for given in [
            ("s3://a/b", "1", 5),
            ("s3://a/b", "1", 6),
            ("s3://a/b", "2", 5),
            ("s3://a/c", "1", 5),
            ("s3://a/b1", "", 5),
            ("s3://a/", "b1", 5),
            ("s3://a/b", "15", 0),
            ("s3://a/\udcff", "1", 5),
        ]
    }
    assert len(keys) == 8
    assert ChunkCache.object_key("s3://a/b", "1", 5) in keys
    assert all(len(key) == 40 and key.isalnum() for key in keys)


def test_write_replaces_what_was_kept(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA[::-1])
    cache.write(KEY, 0, DATA)
    assert read(cache, 0, 40) == DATA


def test_the_same_bytes_are_not_written_again(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA)
    before = the_file(cache).stat().st_ino
    ChunkCache(cache.directory, LIMIT).write(KEY, 0, DATA)
    assert the_file(cache).stat().st_ino == before


def test_discard_forgets_one_piece(cache: ChunkCache) -> None:
    cache.discard(KEY, 0, 40)
    cache.write(KEY, 0, DATA)
    cache.write(KEY, 40, DATA)
    cache.discard(KEY, 0, 40)
    assert (read(cache, 0, 40), read(cache, 40, 40)) == (None, DATA)


def test_discard_forgets_what_another_process_made_the_directory_for(cache: ChunkCache) -> None:
    other = ChunkCache(cache.directory, LIMIT)
    other.write(KEY, 0, DATA)
    cache.discard(KEY, 0, 40)
    assert read(other, 0, 40) is None
    other.close()


def test_nothing_readable_by_others_and_no_url_in_it(cache: ChunkCache) -> None:
    old = os.umask(0)
    try:
        cache.write(KEY, 0, DATA)
    finally:
        os.umask(old)
    for path in [Path(cache.directory), *Path(cache.directory).rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert b"host.example" not in (os.fsencode(path) if path.is_dir() else path.read_bytes())


def test_everything_is_given_back(cache: ChunkCache) -> None:
    before = open_descriptors()
    second = ChunkCache(cache.directory, LIMIT)
    second.write(KEY, 0, DATA)
    second.write(KEY, 9, b"x")
    the_file = files(second)[0]
    the_file.write_bytes(b"damaged")
    read(second, 0, 40)
    read(second, 9, 1)
    second.info()
    second.prune(0)
    second.close()
    second.close()
    assert open_descriptors() == before
    assert read(second, 0, 40) is None


def test_threads_share_one_cache(cache: ChunkCache) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            number = rng.randrange(30)
            data = random.Random(number).randbytes(20_000)
            cache.write(KEY, number, data)
            if read(cache, number, 20_000) not in (data, None):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counters = cache.counters()
    assert counters.hits > 500
    assert (counters.damaged, counters.failed) == (0, 0)


# ---- files that are not what they should be ----


def check_refused(cache: ChunkCache, path: Path) -> None:
    """The file under a piece's name is refused and removed, and the piece can be kept again."""
    assert read(cache, 512, 40) is None
    assert not os.path.lexists(path)
    cache.write(KEY, 512, DATA)
    assert read(cache, 512, 40) == DATA


def test_piece_cut_anywhere_is_refused(cache: ChunkCache) -> None:
    cache.write(KEY, 512, DATA)
    path = the_file(cache)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert read(cache, 512, 40) is None, length
        assert not path.exists(), length
    path.write_bytes(good + b"\0")
    check_refused(cache, path)


def test_piece_with_any_bit_flipped_is_refused(cache: ChunkCache) -> None:
    cache.write(KEY, 512, DATA)
    path = the_file(cache)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert read(cache, 512, 40) is None, bit
        assert not path.exists(), bit
    assert cache.counters().damaged == 8 * len(good)


def test_piece_of_zeros_is_refused(cache: ChunkCache) -> None:
    cache.write(KEY, 512, DATA)
    path = the_file(cache)
    path.write_bytes(bytes(path.stat().st_size))  # what a power cut leaves on some filesystems
    check_refused(cache, path)


def test_damaged_data_behind_a_good_header_is_replaced_once_it_was_read(cache: ChunkCache) -> None:
    cache.write(KEY, 512, DATA)
    path = the_file(cache)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    check_refused(cache, path)


@pytest.mark.parametrize(("key", "offset"), [(OTHER, 512), (KEY, 511)])
def test_piece_that_strayed_is_refused(cache: ChunkCache, key: str, offset: int) -> None:
    cache.write(key, offset, DATA[::-1])
    stray = the_file(cache)
    cache.write(KEY, 512, DATA)
    path = Path(cache.directory, "v1", KEY, piece.name_of(512, 40))
    stray.replace(path)
    check_refused(cache, path)


def make_fifo(path: Path, target: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def make_dangling_link(path: Path, target: Path) -> None:
    path.symlink_to("nowhere")


def make_socket(path: Path, target: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{(fd := os.open(path.parent, os.O_PATH))}/{path.name}")
        os.close(fd)


def make_device(path: Path, target: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes device nodes")


@pytest.mark.parametrize("make", [make_fifo, make_link, make_dangling_link, make_socket, make_device])
def test_planted_node_is_refused_at_once(
    cache: ChunkCache, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    cache.write(KEY, 512, DATA)
    path = the_file(cache)
    path.rename(tmp_path / "good")
    make(path, tmp_path / "good")
    check_refused(cache, path)
    make(Path(cache.directory, "v1", KEY, "1-1"), tmp_path / "good")
    assert (cache.info().pieces, cache.prune().removed) == (1, 1)
    assert (tmp_path / "good").exists()


def test_planted_directory_is_a_miss_and_one_warning(
    cache: ChunkCache, caplog: pytest.LogCaptureFixture
) -> None:
    Path(cache.directory, "v1", KEY, piece.name_of(512, 40)).mkdir(parents=True, mode=0o700)
    os.chmod(Path(cache.directory, "v1"), 0o700)
    for _ in range(3):
        cache.write(KEY, 512, DATA)
        assert read(cache, 512, 40) is None
    assert len(caplog.records) == 1
    assert [path.name for path in files(cache)] == [piece.name_of(512, 40)]


def test_too_many_open_files_is_a_miss_and_removes_nothing(cache: ChunkCache) -> None:
    cache.write(KEY, 512, DATA)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        missed = read(cache, 512, 40)
        cache.write(KEY, 0, DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert missed is None
    assert cache.counters().failed == 2
    assert read(cache, 512, 40) == DATA


def test_failing_disk_is_a_miss(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(KEY, 512, DATA)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        assert read(cache, 512, 40) is None
    assert cache.counters().failed == 1


def test_short_reads_and_writes_are_put_together(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, writev = os.preadv, os.writev

    def first(buffers: list[memoryview], most: int) -> list[memoryview]:
        return [next(memoryview(one) for one in buffers if len(one))[:most]]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, first(buffers, 9), offset))
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, first(buffers, 11)))
    cache.write(KEY, 512, DATA)
    assert read(cache, 512, 40) == DATA


# ---- whose directory it is ----


def test_directory_of_others_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    cache = ChunkCache(str(tmp_path / "cache"), LIMIT)
    cache.write(KEY, 0, DATA)
    for path in (tmp_path / "cache", tmp_path / "cache" / "v1"):
        os.chown(path, 12345, 12345)
        with pytest.raises(
            OptionError, match=rf"{path} belongs to another user \(id 12345\).*choose another"
        ):
            ChunkCache(cache.directory, LIMIT)
        os.chown(path, 0, 0)
    assert read(ChunkCache(cache.directory, LIMIT), 0, 40) == DATA


@pytest.mark.parametrize(("where", "mode"), [("", 0o777), ("", 0o770), ("v1", 0o770), ("v1", 0o1777)])
def test_directory_that_others_may_write_to_is_refused(cache: ChunkCache, where: str, mode: int) -> None:
    cache.write(KEY, 0, DATA)
    path = os.path.join(cache.directory, where)
    os.chmod(path, mode)
    with pytest.raises(OptionError, match=r"may be written to by others .*chmod go-w"):
        ChunkCache(cache.directory, LIMIT)


def test_sticky_directory_is_fit_to_hold_the_real_one(cache: ChunkCache) -> None:
    os.mkdir(cache.directory)
    os.chmod(cache.directory, 0o1777)  # as /tmp
    cache.write(KEY, 0, DATA)
    assert read(cache, 0, 40) == DATA


def test_link_in_place_of_the_real_directory_is_refused(cache: ChunkCache, tmp_path: Path) -> None:
    cache.write(KEY, 0, DATA)
    Path(cache.directory, "v1").rename(tmp_path / "elsewhere")
    Path(cache.directory, "v1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match="is not a directory"):
        ChunkCache(cache.directory, LIMIT)


@pytest.mark.parametrize(("name", "says"), [("file", "is not a directory"), ("nul\0", "cannot be opened")])
def test_impossible_directory_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=says):
        ChunkCache(f"{tmp_path}/{name}", LIMIT)


def test_directory_that_cannot_be_made_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChunkCache(str(tmp_path / "later" / "below"), LIMIT)
    (tmp_path / "later").touch()
    for _ in range(3):
        cache.write(KEY, 0, DATA)
    assert read(cache, 0, 40) is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lazymem.cache", logging.WARNING)
    assert "later" in record.getMessage()
    assert cache.counters().failed == 3


def test_open_cache_obeys_the_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def options(**given: object) -> StoreOptions:
        return StoreOptions(**given)  # type: ignore[arg-type]

    assert open_cache(options()) is None
    assert open_cache(options(cache=str(tmp_path / "c"), cache_size=0)) is None
    cache = open_cache(options(cache=str(tmp_path / "c"), cache_size=5))
    assert cache is not None
    assert (cache.directory, cache.max_bytes) == (str(tmp_path / "c"), 5)
    assert not caplog.records
    (tmp_path / "c").touch()
    assert open_cache(options(cache=str(tmp_path / "c"))) is None
    assert "going on without a cache" in caplog.text


# ---- the limit ----


def block(number: int, size: int = 60_000) -> bytes:
    return random.Random(number).randbytes(size)


def used_at(cache: ChunkCache, number: int, moment: float, size: int = 60_000) -> Path:
    path = Path(cache.directory, "v1", KEY, piece.name_of(number, size))
    os.utime(path, (moment, moment))
    return path


def kept(cache: ChunkCache, count: int, size: int = 60_000) -> list[int]:
    return [number for number in range(count) if read(cache, number, size) == block(number, size)]


def test_limit_holds_while_writing(cache: ChunkCache) -> None:
    for number in range(100):
        cache.write(KEY, number, block(number))
        assert cache.info().bytes <= LIMIT
        assert read(cache, number, 60_000) == block(number)
    assert cache.info().bytes > LIMIT // 2
    assert cache.counters().skipped == 0


def test_longest_unused_goes_first(cache: ChunkCache) -> None:
    now = time.time()
    for number in range(17):
        cache.write(KEY, number, block(number))
        used_at(cache, number, now - HOUR * (50 - number))
    assert read(cache, 0, 60_000) == block(0)  # which makes it the latest
    cache.write(KEY, 17, block(17))
    assert kept(cache, 18) == [0, *range(3, 18)]


def test_use_is_noted_at_most_once_an_hour(cache: ChunkCache) -> None:
    cache.write(KEY, 0, block(0))
    now = time.time()
    for moment, noted in ((now - HOUR / 2, False), (now - 2 * HOUR, True), (now + 2 * HOUR, True)):
        path = used_at(cache, 0, moment)
        before = path.stat().st_mtime_ns
        assert read(cache, 0, 60_000) == block(0)
        assert (path.stat().st_mtime_ns != before) == noted
        assert abs(path.stat().st_mtime - now) < HOUR


def test_piece_larger_than_the_limit_is_not_kept(cache: ChunkCache) -> None:
    cache.write(KEY, 0, block(0))
    cache.write(KEY, 1, bytes(LIMIT))
    assert cache.info().pieces == 1
    assert (cache.counters().skipped, cache.counters().failed) == (1, 0)
    cache.write(KEY, 2, bytes(LIMIT - 4096))  # just fits, alone
    assert cache.info().pieces == 1
    assert read(cache, 2, LIMIT - 4096) == bytes(LIMIT - 4096)


def test_small_pieces_count_as_what_they_take(cache: ChunkCache) -> None:
    for number in range(300):
        cache.write(KEY, number, b"%d" % number)
    assert cache.info().pieces <= LIMIT // 4096


def test_two_instances_keep_one_limit(cache: ChunkCache) -> None:
    other = ChunkCache(cache.directory, LIMIT)
    for number in range(60):
        (cache if number % 2 else other).write(KEY, number, block(number))
        assert cache.info().bytes <= LIMIT


def test_what_was_there_before_counts(cache: ChunkCache) -> None:
    for number in range(16):
        cache.write(KEY, number, block(number))
    Path(cache.directory, "v1", "usage").unlink()
    later = ChunkCache(cache.directory, LIMIT)
    for number in range(20, 30):
        later.write(KEY, number, block(number))
        assert later.info().bytes <= LIMIT


@pytest.mark.parametrize("content", [b"", b"x", bytes(16), b"\xff" * 16, bytes(1 << 16)])
def test_damaged_number_is_counted_anew(cache: ChunkCache, content: bytes) -> None:
    for number in range(40):
        Path(cache.directory, "v1", "usage").parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        os.chmod(cache.directory, 0o700)
        if number % 8 == 0:
            Path(cache.directory, "v1", "usage").write_bytes(content)
        cache.write(KEY, number, block(number))
        assert read(cache, number, 60_000) == block(number)
        assert cache.info().bytes <= LIMIT


def test_planted_lock_is_a_warning_not_a_hang(cache: ChunkCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.write(KEY, 0, DATA)
    usage = Path(cache.directory, "v1", "usage")
    usage.unlink()
    os.mkfifo(usage)
    cache.write(KEY, 1, DATA)
    assert "usage is not a regular file" in caplog.text
    assert (read(cache, 0, 40), read(cache, 1, 40)) == (DATA, None)


def test_lock_that_somebody_keeps_stops_nobody(cache: ChunkCache) -> None:
    cache.write(KEY, 0, block(0))
    with open(Path(cache.directory, "v1", "usage"), "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a process that was stopped holds it
        for number in range(1, 5):
            cache.write(KEY, number, block(number))
    assert kept(cache, 5) == [*range(5)]
    for number in range(5, 40):
        cache.write(KEY, number, block(number))
        assert cache.info().bytes <= LIMIT  # what was written meanwhile is counted


def test_prune_that_never_ends_bounds_the_writers(cache: ChunkCache) -> None:
    cache.write(KEY, 0, block(0))
    with open(Path(cache.directory, "v1", "prune.lock"), "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for number in range(1, 50):
            cache.write(KEY, number, block(number))
    assert LIMIT < cache.info().bytes <= LIMIT * 11 // 10
    assert cache.counters().skipped > 20
    cache.write(KEY, 99, block(99))
    assert cache.info().bytes <= LIMIT


# ---- prune and info ----


def test_prune_removes_down_to_what_is_asked(cache: ChunkCache) -> None:
    now = time.time()
    for number in range(10):
        cache.write(KEY if number % 2 else OTHER, number, block(number))
    for number, path in enumerate(sorted(files(cache), key=lambda path: int(path.name.split("-")[0], 16))):
        os.utime(path, (now - HOUR * (10 - number),) * 2)
    one = piece.disk_usage(60_064)
    report = cache.prune(4 * one + 100)
    assert (report.removed, report.removed_bytes, report.pieces, report.bytes) == (6, 6 * one, 4, 4 * one)
    info = cache.info()
    assert (info.pieces, info.bytes, info.objects, info.max_bytes) == (4, 4 * one, 2, LIMIT)
    assert info.oldest is not None
    assert info.newest is not None
    assert (round(now - info.oldest), round(now - info.newest)) == (4 * HOUR, HOUR)
    assert cache.prune(one).pieces == 1
    assert cache.info().objects == 1


def test_prune_of_pieces_used_in_one_minute_removes_no_more_than_it_must(cache: ChunkCache) -> None:
    for number in range(10):
        cache.write(KEY, number, block(number))
        used_at(cache, number, 60_000_000.0 + number)
    assert cache.prune(4 * piece.disk_usage(60_064)).pieces == 4


def test_prune_all_leaves_nothing_of_ours(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA)
    cache.write(OTHER, 0, DATA)
    fresh = Path(cache.directory, "v1", KEY, piece.temporary_of("0-28"))
    fresh.touch()
    foreign = [Path(cache.directory, "notes.txt"), Path(cache.directory, "v1", "notes.txt")]
    for path in foreign:
        path.write_text("mine")
    report = cache.prune(0)
    assert (report.removed, report.pieces, report.bytes) == (3, 0, 0)
    left = [path for path in Path(cache.directory).rglob("*") if not path.is_dir()]
    assert {path.name for path in left} <= {"notes.txt", "usage", "prune.lock"}
    assert all(path.exists() for path in foreign)
    assert cache.info().objects == 0
    cache.write(KEY, 0, DATA)
    assert read(cache, 0, 40) == DATA


def test_prune_removes_only_temporaries_that_nobody_writes(cache: ChunkCache) -> None:
    cache.write(KEY, 0, DATA)
    folder = the_file(cache).parent
    fresh, stale, future = (folder / piece.temporary_of("0-28") for _ in range(3))
    for path, age in ((fresh, 60), (stale, 2 * HOUR), (future, -2 * HOUR)):
        path.write_bytes(b"part")
        os.utime(path, (time.time() - age,) * 2)
    assert cache.info().temporaries == 3
    assert cache.prune().removed == 2
    assert sorted(files(cache)) == sorted([folder / "0-28", fresh])


def test_prune_refuses_a_negative_limit(cache: ChunkCache) -> None:
    with pytest.raises(OptionError, match="must be 0 or more"):
        cache.prune(-1)


def test_info_and_prune_of_nothing_make_nothing(cache: ChunkCache) -> None:
    assert (cache.info().pieces, cache.info().oldest) == (0, None)
    assert cache.prune(0).removed == 0
    assert not Path(cache.directory).exists()


# ---- disks ----


# In a mount namespace of its own: the disk is gone when the process is, however that ends.
ON_A_TINY_DISK = """
    import os, random, subprocess, sys
    from lazymem.cache import ChunkCache, chunks
    disk = sys.argv[1]
    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "lazymem-test", disk]).returncode == 0
    if not mount("-o", "size=1m,mode=700"):
        sys.exit(77)
    cache = ChunkCache(disk + "/cache", 1 << 30)
    key = cache.object_key("u", "i", 1)
    def block(number):
        return random.Random(number).randbytes(60_000)
    def has(number):
        out = bytearray(60_000)
        return cache.read_into(key, number, memoryview(out)) and out == block(number)
"""


def on_a_tiny_disk(tmp_path: Path, code: str, *arguments: object) -> tuple[str, str]:
    """Standard output, and the warnings."""
    code = textwrap.dedent(ON_A_TINY_DISK) + textwrap.dedent(code)
    done = run_child(code, tmp_path, *arguments, prefix=("unshare", "--mount"))
    if done.returncode == 77 or done.stderr.startswith("unshare: "):
        pytest.skip("needs the right to mount a tmpfs")
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("guarded", [True, False])
def test_full_disk_is_one_warning(tmp_path: Path, guarded: bool) -> None:
    """Both when the guard sees it coming, and when somebody else fills the disk right after the guard."""
    code = """
        guarded = sys.argv[2] == "True"
        if not guarded:
            chunks.spare_bytes = lambda fd: 1 << 40
        for number in range(40):
            cache.write(key, number, block(number))
        kept = sum(has(number) for number in range(40))
        assert 13 <= kept <= 17, kept
        counters = cache.counters()
        assert counters.written == kept
        assert (counters.skipped if guarded else counters.failed) == 40 - kept
        assert cache.info().temporaries == 0
        space = os.statvfs(disk)
        assert space.f_bavail * 20 >= space.f_blocks or not guarded
        assert cache.prune(500_000).bytes <= 500_000
        cache.write(key, 99, block(99))
        assert has(99)
        print("done")
    """
    out, err = on_a_tiny_disk(tmp_path, code, guarded)
    assert out == "done\n"
    assert err.count("\n") == 1
    assert ("nearly full" if guarded else "No space left on device") in err
    assert str(tmp_path / "cache") in err


def test_disk_that_became_read_only_still_gives(tmp_path: Path) -> None:
    code = """
        cache.write(key, 0, block(0))
        os.utime(f"{disk}/cache/v1/{key}/0-ea60", (0, 0))
        assert mount("-o", "remount,ro")
        for number in range(1, 4):
            cache.write(key, number, block(number))
            cache.discard(key, 0, 60_000)
        assert has(0) and not has(1)
        print("done")
    """
    out, err = on_a_tiny_disk(tmp_path, code)
    assert out == "done\n"
    assert err.count("\n") == 1
    assert "Read-only file system" in err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_failed_write_leaves_nothing(
    cache: ChunkCache, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write(KEY, 0, DATA)
    number = Path(cache.directory, "v1", "usage").read_bytes()
    writev = os.writev

    def fail(fd: int, buffers: list[memoryview]) -> int:
        if os.fstat(fd).st_size:
            raise OSError(code, os.strerror(code))
        return writev(fd, [buffers[0]])

    with monkeypatch.context() as full:
        full.setattr(os, "writev", fail)
        for _ in range(3):
            cache.write(KEY, 1, DATA)
    assert [path.name for path in files(cache)] == ["0-28"]
    assert Path(cache.directory, "v1", "usage").read_bytes() == number
    assert [os.strerror(code) in record.getMessage() for record in caplog.records] == [True]
    assert caplog.records[0].getMessage().startswith(f"the cache {cache.directory} ")
    cache.write(KEY, 1, DATA)
    assert read(cache, 1, 40) == DATA


def test_interrupted_write_leaves_nothing(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(os, "writev", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.write(KEY, 0, DATA)
    assert files(cache) == []


def test_file_size_limit_of_the_process_is_one_warning(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from lazymem.cache import ChunkCache
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        cache = ChunkCache(sys.argv[1], 1 << 20)
        key = cache.object_key("u", "i", 1)
        cache.write(key, 0, bytes(200_000))
        cache.write(key, 0, bytes(50_000))
        print(cache.counters().failed, cache.counters().written, cache.info().temporaries)
    """
    done = run_child(code, tmp_path / "cache")
    assert done.stdout == "1 1 0\n"
    assert "File too large" in done.stderr


def test_directory_removed_while_open_is_made_again(cache: ChunkCache) -> None:
    for again in range(3):
        cache.write(KEY, 0, DATA)
        cache.write(KEY, 1, DATA)
        assert (read(cache, 0, 40), read(cache, 1, 40)) == (DATA, DATA)
        before = open_descriptors()
        shutil.rmtree(Path(cache.directory, "v1") if again else cache.directory)
        assert read(cache, 0, 40) is None
        cache.discard(KEY, 0, 40)
        assert cache.prune(0).removed == 0
        cache.write(KEY, 0, DATA)
        assert read(cache, 0, 40) == DATA
        assert open_descriptors() == before


def test_object_directories_that_vanish_are_made_again(
    cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prune may remove an empty directory between its making and its first file."""
    mkdir = os.mkdir
    calls = []

    def vanish(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        if path == KEY and len(calls) < 2:
            calls.append(path)
            os.rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", vanish)
    cache.write(KEY, 0, DATA)
    assert calls == [KEY, KEY]
    assert read(cache, 0, 40) == DATA


# ---- processes ----

WORK = """
    import os, random, sys
    from lazymem.cache import ChunkCache
    directory, limit, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    cache = ChunkCache(directory, limit)
    rng = random.Random(seed)
    keys = [cache.object_key("u", str(number), 1) for number in range(3)]
    for step in range(rounds):
        which = rng.randrange(3)
        number = rng.randrange(40)
        data = random.Random(100 * which + number).randbytes(1000 + 1500 * number)
        out = bytearray(len(data))
        action = rng.random()
        if cache.read_into(keys[which], number, memoryview(out)):
            assert out == data, (which, number)
        elif action < 0.9:
            cache.write(keys[which], number, data)
        if action > 0.97:
            cache.prune(rng.choice([0, limit // 3, limit]))
        elif action > 0.94:
            cache.discard(keys[which], number, len(data))
        if step % 100 == 0:
            print(step, flush=True)
    counters = cache.counters()
    assert counters.hits and counters.written, counters
    assert (counters.damaged, counters.failed) == (0, 0), counters
"""


def start_worker(cache: ChunkCache, seed: int, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORK), cache.directory, str(LIMIT), str(seed), str(rounds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_write_read_and_prune_at_once(cache: ChunkCache) -> None:
    workers = [start_worker(cache, seed, 500) for seed in range(4)]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=100)
            assert (worker.returncode, err) == (0, "")
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    cache.write(KEY, 0, DATA)
    assert cache.info().bytes <= LIMIT * 11 // 10
    assert cache.info().temporaries == 0


def test_killed_writers_leave_nothing_wrong(cache: ChunkCache) -> None:
    rng = random.Random(3)
    keys = [cache.object_key("u", str(number), 1) for number in range(3)]
    found = 0
    for seed in range(12):
        worker = start_worker(cache, seed, 1_000_000)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "0\n"
        deadline = time.monotonic() + rng.random() * 0.05  # wherever that finds it
        while time.monotonic() < deadline:
            pass
        worker.kill()
        _, err = worker.communicate(timeout=60)
        assert (worker.returncode, err) == (-signal.SIGKILL, "")
        for which, key in enumerate(keys):
            for number in range(40):
                data = random.Random(100 * which + number).randbytes(1000 + 1500 * number)
                got = read(cache, number, len(data), key)
                assert got in (data, None)
                found += got is not None
    assert found
    assert cache.counters().damaged == 0
    for path in files(cache):
        if piece.is_temporary(path.name):
            os.utime(path, (0, 0))
    cache.prune()
    assert cache.info().temporaries == 0
    for number in range(60):
        cache.write(KEY, number, block(number))
    assert cache.info().bytes <= LIMIT


def test_killed_in_the_middle_of_a_write_leaves_a_temporary_that_prune_removes(cache: ChunkCache) -> None:
    code = """
        import os, signal, sys
        from lazymem.cache import ChunkCache
        writev = os.writev
        def die(fd, buffers):
            writev(fd, [buffers[1][:10]])
            os.kill(os.getpid(), signal.SIGKILL)
        os.writev = die
        cache = ChunkCache(sys.argv[1], 1 << 20)
        cache.write(cache.object_key("u", "i", 1), 0, bytes(100))
    """
    assert run_child(code, cache.directory).returncode == -signal.SIGKILL
    fresh = ChunkCache(cache.directory, LIMIT)
    key = cache.object_key("u", "i", 1)
    assert read(fresh, 0, 100, key) is None
    assert fresh.info().temporaries == 1
    (left,) = files(fresh)
    assert piece.is_temporary(left.name)
    assert fresh.prune().removed == 0
    os.utime(left, (0, 0))
    assert fresh.prune().removed == 1


def test_importing_it_loads_nothing_heavy() -> None:
    """The fetcher imports it without lazymem/__init__.py, on the way to the first byte."""
    code = """
        import importlib.util, sys, types
        package = types.ModuleType("lazymem")
        package.__path__ = importlib.util.find_spec("lazymem").submodule_search_locations
        sys.modules["lazymem"] = package
        import lazymem.cache
        print([name for name in ("numpy", "boto3", "rich", "click", "ssl", "cffi") if name in sys.modules])
    """
    assert check_child(code) == "[]\n"
