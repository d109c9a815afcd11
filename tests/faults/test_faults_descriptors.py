# SPDX-License-Identifier: Apache-2.0
"""What an application does to descriptors: begins without the standard ones, closes all, opens its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..children import check_child, run_child
from .test_faults_damage import damaged  # noqa: F401

WAYS = ["uffd", "uffd-user", "sigsegv", "eager"]

OWN = """
import os, sys
import numpy as np
import lazymem

def take_over():
    # As daemons do: close everything, then open what is one's own, which gets the numbers.
    os.closerange(3, 64)
    return [os.open("/dev/null", os.O_RDWR) for _ in range(12)]

def gone(own):
    null = os.stat("/dev/null").st_rdev
    return [fd for fd in own if not os.path.exists(f"/proc/self/fd/{fd}") or os.fstat(fd).st_rdev != null]
"""


@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_arrays_do_not_show_what_is_printed_where_standard_descriptors_are_closed(
    snapshot_path: Path, tmp_path: Path, backend: str, closed: str
) -> None:
    code = """
import os, sys
import numpy as np
import lazymem
from tests.arrays import make_arrays
snap = lazymem.open(sys.argv[1], backend=sys.argv[2])
array, expected = snap["ids"], make_arrays()["ids"]
array[:4].copy()
for fd in (0, 1, 2):
    try:
        os.write(fd, b"a warning of some library's" * 40)
    except OSError:
        pass
right = np.array_equal(array, expected)
with open(sys.argv[3], "w") as file:
    file.write(f"{right} {snap.backend}")
"""
    told = tmp_path / "told"
    command = f'exec "$0" -c "$1" "$2" "$3" "$4" {closed}'
    arguments = ["sh", "-c", command, sys.executable, code, str(snapshot_path), backend, str(told)]
    subprocess.run(arguments, timeout=60, check=False, cwd=Path(__file__).parents[2])
    assert told.read_text() == f"True {backend}"


@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize("backend", WAYS)
def test_closing_leaves_the_application_its_own_descriptors(snapshot_path: Path, backend: str) -> None:
    code = (
        OWN
        + """
snap = lazymem.open(sys.argv[1], backend=sys.argv[2], readahead=0)
array = snap["ids"]
array[0]
own = take_over()
pid = os.fork()
if pid == 0:
    os.write(1, f"child {gone(own)}\\n".encode())
    os._exit(0)
os.waitpid(pid, 0)
del array
snap.close()
del snap
print("parent", gone(own))
"""
    )
    assert check_child(code, snapshot_path, backend) == "child []\nparent []\n"


@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize("backend", ["uffd", "uffd-user"])
@pytest.mark.parametrize("touches", [False, True])
def test_daemon_with_sockets_of_its_own_ends(snapshot_path: Path, backend: str, touches: bool) -> None:
    """Its sockets have the engine's numbers: nobody may wait at them. A touch is SIGSEGV, after a line."""
    code = """
import os, socket, sys
import lazymem
snap = lazymem.open(sys.argv[1], backend=sys.argv[2], readahead=0)
array = snap["ids"]
array[0]
pid = os.fork()
if pid:
    status = os.waitpid(pid, 0)[1]
    print("ended", os.WTERMSIG(status), os.WEXITSTATUS(status))
    sys.stdout.flush()
    os._exit(0)
os.setsid()
os.closerange(3, 1024)
own = [socket.socketpair() for _ in range(10)]
if sys.argv[3] == "True":
    array[250_000]
"""
    done = run_child(code, snapshot_path, backend, touches)
    assert done.stdout == (f"ended {signal.SIGSEGV.value} 0\n" if touches else "ended 0 0\n"), done.stderr
    assert "descriptors were closed by the application" in done.stderr or not touches


@pytest.mark.needs_userfaultfd
def test_line_of_a_failed_touch_comes_where_no_descriptor_may_be_opened(
    damaged: tuple[Path, int],  # noqa: F811
) -> None:
    code = """
import resource, sys
import lazymem
snap = lazymem.open(sys.argv[1], readahead=0)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
for name in snap:
    snap[name].sum()
"""
    done = run_child(code, damaged[0])
    assert done.returncode == -signal.SIGBUS
    assert "SIGBUS follows" in done.stderr
