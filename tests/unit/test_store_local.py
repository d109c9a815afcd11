# SPDX-License-Identifier: Apache-2.0
"""Local files: reads that are whole or an error, writes that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lazymem.errors import AccessDenied, BuildError, ReadError, SnapshotChanged, SnapshotNotFound
from lazymem.store.base import Blob
from lazymem.store.local import AtomicFile, LocalBlob


@pytest.fixture
def content() -> bytes:
    return bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "файл.bin"
    path.write_bytes(content)
    return path


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_blob_reads_ranges_of_the_file(path: Path, content: bytes) -> None:
    with LocalBlob(path) as blob:
        assert isinstance(blob, Blob)
        assert (blob.url, blob.path, blob.size) == (str(path), str(path), len(content))
        assert blob.read(0, blob.size) == content
        assert blob.read(255, 3) == b"\xff\x00\x01"
        assert blob.read(blob.size, 0) == b""
        assert os.pread(blob.fileno(), 4, 1) == content[1:5]


def test_blob_takes_bytes_and_relative_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LocalBlob(os.fsencode(path)).url == str(path)
    monkeypatch.chdir(path.parent)
    blob = LocalBlob(path.name)
    assert (blob.url, blob.path) == (path.name, str(path))


def test_blob_descriptor_is_closed_on_exec_and_by_close(path: Path) -> None:
    before = open_descriptors()
    blob = LocalBlob(path)
    assert not os.get_inheritable(blob.fileno())
    blob.close()
    blob.close()
    assert open_descriptors() == before
    with pytest.raises(ReadError, match="is closed"):
        blob.read(0, 1)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 10241), (10241, 0), (-1, 1), (0, -1), (1 << 70, 1), (1, 1 << 70)]
)
def test_blob_read_outside_the_file_is_refused(path: Path, offset: int, length: int) -> None:
    with LocalBlob(path) as blob, pytest.raises(ReadError, match="the file has 10240"):
        blob.read(offset, length)


def test_blob_puts_short_reads_together(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 1000), offset))
    with LocalBlob(path) as blob:
        assert blob.read(5, 9000) == content[5:9005]


def test_blob_of_a_file_cut_while_open_says_that_it_changed(path: Path) -> None:
    with LocalBlob(path) as blob:
        identity = blob.identity
        os.truncate(path, 100)
        with pytest.raises(SnapshotChanged, match="ends at byte 100"):
            blob.read(50, 100)
        assert blob.identity == identity
        assert LocalBlob(path).identity != identity


def test_blob_short_read_of_an_unchanged_file_says_where_it_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalBlob(path) as blob:
        monkeypatch.setattr(os, "pread", lambda fd, length, offset: b"")
        with pytest.raises(ReadError, match="ended at byte 7"):
            blob.read(7, 10)


def test_blob_read_error_carries_its_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with LocalBlob(path) as blob:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(ReadError, match="Input/output error"):
            blob.read(0, 1)


def test_blob_of_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = open_descriptors()
    null = Path("/dev/null")
    for path, kind in ((tmp_path, "directory"), (fifo, "named pipe"), (null, "character device")):
        with pytest.raises(ReadError, match=f"is a {kind}"):
            LocalBlob(path)
    assert open_descriptors() == before


def test_blob_of_an_empty_path_says_that_it_is_empty() -> None:
    with pytest.raises(SnapshotNotFound, match="path is empty"):
        LocalBlob("")


@pytest.mark.parametrize("name", ["absent", "file.txt/below", "nul\0"])
def test_blob_of_nothing_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(SnapshotNotFound, match=name[:3]) as caught:
        LocalBlob(f"{tmp_path}/{name}")
    assert caught.value.url == f"{tmp_path}/{name}"


def test_blob_without_rights_is_denied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Mode bits do not stop root, who runs tests in containers.
    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessDenied, match="may not be read"):
        LocalBlob(path)


@pytest.fixture(params=["tmpfile", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing: without a name, and, where the filesystem cannot, under another one."""
    if request.param == "named":
        real = os.open

        def refuse(path: str, flags: int, *args: object, **options: object) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse)
    return str(request.param)


def test_atomic_file_appears_whole_at_the_end(tmp_path: Path, way: str, content: bytes) -> None:
    before, target = open_descriptors(), tmp_path / "out"
    with AtomicFile(target) as out:
        out.file.write(content)
        out.file.seek(1)
        out.file.write(b"!")
        assert not target.exists()
        assert len(os.listdir(tmp_path)) == (0 if way == "tmpfile" else 1)
    assert target.read_bytes() == content[:1] + b"!" + content[2:]
    assert os.listdir(tmp_path) == ["out"]
    assert open_descriptors() == before


def test_atomic_file_obeys_the_umask(tmp_path: Path, way: str) -> None:
    old = os.umask(0o027)
    try:
        with AtomicFile(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_atomic_file_keeps_the_mode_of_what_it_replaces(tmp_path: Path, way: str, mode: int) -> None:
    target = tmp_path / "out"
    target.touch()
    target.chmod(mode)
    with AtomicFile(target) as out:
        out.file.write(b"new")
        # Under its temporary name too, nobody may read it who could not read the old one.
        assert all(stat.S_IMODE(path.stat().st_mode) == mode for path in tmp_path.iterdir())
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_bytes() == b"new"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_atomic_file_refuses_what_is_no_regular_file(
    tmp_path: Path, make: Callable[[Path], None], through_a_link: bool
) -> None:
    node = tmp_path / "node"
    make(node)
    kind = stat.S_IFMT(node.stat().st_mode)
    target = node
    if through_a_link:
        target = tmp_path / "link"
        target.symlink_to(node)
    before, names = open_descriptors(), sorted(os.listdir(tmp_path))
    with pytest.raises(BuildError, match="name a regular file"):
        AtomicFile(target)
    assert stat.S_IFMT(node.stat().st_mode) == kind
    assert open_descriptors() == before
    assert sorted(os.listdir(tmp_path)) == names


def test_atomic_file_refuses_a_pipe_that_appeared_meanwhile(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    with pytest.raises(BuildError, match="is a named pipe"), AtomicFile(target):
        os.mkfifo(target)
    assert stat.S_ISFIFO(target.stat().st_mode)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_atomic_file_through_a_link_replaces_what_it_leads_to(tmp_path: Path, way: str, exists: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "out", tmp_path / "link", tmp_path / "second"
    if exists:
        target.write_bytes(b"old")
    second.symlink_to("far/out")
    link.symlink_to(second)
    with AtomicFile(link) as out:
        out.file.write(b"new")
    assert target.read_bytes() == b"new"
    assert (link.is_symlink(), second.is_symlink(), target.is_symlink()) == (True, True, False)
    assert sorted(os.listdir(tmp_path)) == ["far", "link", "second"]
    assert os.listdir(tmp_path / "far") == ["out"]


def test_atomic_file_refuses_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BuildError, match="leads back to itself"):
        AtomicFile(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize(("path", "says"), [("", "path is empty"), ("nul\0", "is not a path")])
def test_atomic_file_of_no_path_says_so(path: str, says: str) -> None:
    with pytest.raises(BuildError, match=says):
        AtomicFile(path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_file_leaves_nothing_after_an_exception(
    tmp_path: Path, way: str, error: type[BaseException], content: bytes
) -> None:
    before = open_descriptors()
    target = tmp_path / "out"
    target.write_bytes(b"old")
    out = AtomicFile(target)
    out.file.write(content)
    with pytest.raises(error), out:
        raise error
    # What was still buffered must not go to whichever file gets the descriptor's number next.
    with open(tmp_path / "other", "wb") as other:
        del out
        other.flush()
    assert target.read_bytes() == b"old"
    assert (tmp_path / "other").read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    assert open_descriptors() == before


def test_atomic_file_replaces_only_if_allowed(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    with AtomicFile(target, overwrite=False) as out:
        out.file.write(b"first")
    with AtomicFile(target) as out:
        out.file.write(b"second")
    with pytest.raises(BuildError, match="exists already"):
        AtomicFile(target, overwrite=False)
    assert target.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_file_does_not_replace_what_appeared_meanwhile(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    out = AtomicFile(target, overwrite=False)
    target.write_bytes(b"theirs")
    with pytest.raises(BuildError, match="exists already"), out:
        out.file.write(b"ours")
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_file_name_may_have_all_of_255_bytes(tmp_path: Path, way: str) -> None:
    target = tmp_path / ("я" * 127 + "x")
    with AtomicFile(target) as out:
        out.file.write(b"data")
    assert os.listdir(tmp_path) == [target.name]


def test_atomic_file_of_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from lazymem.store.local import AtomicFile\n"
        "with AtomicFile(sys.argv[1]) as out:\n"
        "    out.file.write(bytes(1 << 22))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_atomic_file_that_replaces_nothing_never_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", lambda *_, **__: pytest.fail("renamed"))
    with AtomicFile(tmp_path / "new") as target:
        target.file.write(b"bytes")
    assert (tmp_path / "new").read_bytes() == b"bytes"


def test_atomic_file_full_disk_says_how_far_it_came(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def fill(fd: int, data: memoryview) -> int:
        if os.fstat(fd).st_size >= 3 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: 1 << 20])

    out = AtomicFile(tmp_path / "out")
    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(BuildError, match=r"after 3145728 bytes .*make room"), out:
        out.file.write(bytes(5 << 20))
    assert os.listdir(tmp_path) == []


def test_atomic_file_failing_at_the_sync_leaves_nothing(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BuildError, match="failed after 4 bytes"), AtomicFile(tmp_path / "out") as out:
        out.file.write(b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("absent/out", "create it"), ("file/out", "is not a dir"), ("", "is a directory"), ("dir", "is a dir")],
)
def test_atomic_file_of_an_impossible_path_says_why(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    before = open_descriptors()
    with pytest.raises(BuildError, match=says):
        AtomicFile(f"{tmp_path}/{name}")
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [(errno.EACCES, AccessDenied, "no rights"), (errno.EROFS, BuildError, "read-only")],
)
def test_atomic_file_refused_by_the_system_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], says: str
) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error, match=says):
        AtomicFile(tmp_path / "out")


@pytest.mark.parametrize("again", [False, True])
def test_closed_descriptor_is_neither_a_change_nor_closed_twice(tmp_path: Path, again: bool) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    path.write_bytes(b"bytes")
    other.write_bytes(b"other")
    blob = LocalBlob(path)
    number = blob.fileno()
    with other.open("rb") as file:
        if again:
            os.dup2(file.fileno(), number)
        else:
            os.close(number)
        with pytest.raises(ReadError, match="closed by this process"):
            blob.has_changed()
        blob.close()
        if again:
            assert os.pread(number, 5, 0) == b"other"
            os.close(number)
