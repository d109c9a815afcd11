# SPDX-License-Identifier: Apache-2.0
"""Touches that come as signals (backend "sigsegv"): right bytes, or the signal that belongs there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..children import check_child, run_child
from .test_faults_damage import NAME, damage
from .test_faults_gil_network import OPTIONS

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

SEGV, BUS = -int(signal.SIGSEGV), -int(signal.SIGBUS)

#: What each function of trapped.py ends with, and what it prints, in this order; more may lie between.
ENDS: dict[str, tuple[int, list[str]]] = {
    "threads_that_hold_the_gil": (0, ["[] {2} True True\n"]),
    "calls_of_a_snapshot": (0, ["True 0 299999 0\nTrue 5 1\n(0, 0)\n"]),
    "zeros_and_casts": (0, ["3 99999.0\nTrue\n"]),
    "system_call_on_untouched_memory": (0, ["Bad address\n8 1\n"]),
    "mprotect_of_untouched_memory": (0, ["[]\n[]\n"]),
    "mprotect_that_forbids_reading": (SEGV, ["forbidden\n"]),
    "mprotect_that_forbids_writing": (SEGV, ["7\n"]),
    "pages_given_back": (0, ["[]\n[]\n"]),
    "locked_memory": (0, ["True []\n[] []\n"]),
    "unmapped_memory": (SEGV, ["7\n"]),
    "no_mappings_left": (0, ["True ReadError True\n[]\n"]),
    "real_fault": (SEGV, ["7\n"]),
    "real_fault_under_faulthandler": (SEGV, ["7\n", "Segmentation fault", "do_real_fault"]),
    "real_fault_under_a_later_faulthandler": (SEGV, ["1\n", "Segmentation fault", "do_real_fault"]),
    "touch_under_a_later_faulthandler": (SEGV, ["7\n", "Segmentation fault", "do_touch"]),
    "touches_after_later_handlers_and_another_open": (0, ["[] []\n"]),
    "real_fault_after_close": (SEGV, ["closed\n", "Segmentation fault", "do_real_fault"]),
    "write_to_read_only_memory": (SEGV, ["7\n"]),
    "write_to_untouched_read_only_memory": (SEGV, []),
    "signal_that_somebody_sent": (SEGV, ["7\nignored\n"]),
    "handlers_are_taken_off": (0, ["0 True 0\n"]),
    "poison": (BUS, ["True\n", "SIGBUS follows", NAME, "checksum"]),
    "poison_under_faulthandler": (BUS, ["True\n", "SIGBUS follows", "Bus error", "do_poison"]),
    "poison_under_a_later_faulthandler": (BUS, ["SIGBUS follows", "Bus error", "do_poison"]),
    "poison_heals": (0, ["SIGBUS follows", f"[{-BUS}] True []\n"]),
    "fork_with_chunks_in_flight": (0, ["right\n"]),
    "evict_after_fork": (0, ["[] 0 []\n"]),
    "evict_gives_memory_back": (0, ["True True\nTrue\n"]),
    "fork_that_runs_no_handlers": (0, [f"7\n{SEGV}\n"]),
    "close_all_descriptors": (BUS, ["True\n", "SIGBUS follows", "closed descriptors of lazymem"]),
    "close_after_all_descriptors_are_gone": (0, ["[]\nclosed\n"]),
    "number_of_the_stage_used_again": (0, ["[]\n[]\nTrue True\n"]),
}


@pytest.fixture(scope="module")
def results(snapshot_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    damaged = tmp_path_factory.mktemp("sigsegv") / "damaged.lzm"
    shutil.copy(snapshot_path, damaged)
    damage(damaged)
    code = "import runpy; runpy.run_module('tests.faults.trapped', run_name='__main__')"
    out = check_child(code, snapshot_path, damaged, env={"LAZYMEM_BACKEND": "auto"}, deadline=100)
    return {name: (status, said) for name, (status, said) in json.loads(out).items()}


@pytest.mark.parametrize("name", ENDS)
def test_process_ends_as_it_should(name: str, results: dict[str, tuple[int, str]]) -> None:
    status, said = results[f"do_{name}"]
    wanted, parts = ENDS[name]
    at = 0
    for part in parts:
        assert part in said[at:], said
        at = said.index(part, at) + len(part)
    assert status == wanted, said
    if "under_" not in name:  # faulthandler says more
        assert said.count("lazymem:") == ("SIGBUS follows" in parts), said
    assert said.count("Fatal Python error") == ("under_" in name or "after_close" in name), said


def test_every_process_is_looked_at(results: dict[str, tuple[int, str]]) -> None:
    assert set(results) == {f"do_{name}" for name in ENDS}


def test_touches_are_served_from_a_store(s3: Bucket, snapshot_path: Path) -> None:
    """Eight threads that hold the GIL, a fork with ranges out, and the courier's chunks evicted."""
    s3.put("model.lzm", snapshot_path.read_bytes())
    code = """
    import json, os, sys, threading
    import numpy as np
    import lazymem
    from tests.conftest import make_arrays

    expected = make_arrays()

    def wrong():
        return [name for name in expected if snap[name].tobytes() != expected[name].tobytes()]

    snap = lazymem.open(sys.argv[1], backend="sigsegv", mode="c", storage_options=json.loads(sys.argv[2]))
    threads = [threading.Thread(target=wrong) for _ in range(8)]
    for thread in threads:
        thread.start()
    pid = os.fork()
    if pid == 0:
        os._exit(bool(wrong()))
    for thread in threads:
        thread.join()
    first = wrong()
    snap.evict()
    print(snap.backend, first, wrong(), os.waitpid(pid, 0)[1])
    """
    assert check_child(code, s3.url("model.lzm"), OPTIONS) == "sigsegv [] [] 0\n"


def test_auto_takes_it_where_a_filter_refuses_userfaultfd(snapshot_path: Path) -> None:
    """As container runtimes refuse it. An uncompressed file is mapped all the same."""
    code = """
    import ctypes, os, struct, sys
    import numpy as np
    import lazymem
    numbers = {"x86_64": (0xC000003E, 323), "aarch64": (0xC00000B7, 282)}
    machine, number = numbers[os.uname().machine]
    refuse = 0x00050000 | 1  # SECCOMP_RET_ERRNO, EPERM
    program = b"".join(struct.pack("<HBBI", *line) for line in (
        (0x20, 0, 0, 4), (0x15, 0, 3, machine),  # not this machine's calls: allowed
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refuse), (0x06, 0, 0, 0x7FFF0000),
    ))
    held = ctypes.create_string_buffer(program)
    filter = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)  # nor the device
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0
    try:
        lazymem.open(sys.argv[1], backend="uffd-user")
    except lazymem.BackendUnavailable as error:
        print("refused")
    snap = lazymem.open(sys.argv[1])
    print(snap.backend, int(snap["ids"][-1]), snap.stats().chunks_populated < 5)
    """
    copy = Path("/tmp") / f"lazymem-filter-{os.getpid()}.lzm"
    shutil.copy(snapshot_path, copy)
    os.chmod(copy, 0o644)
    try:
        assert check_child(code, copy, env={"LAZYMEM_BACKEND": "auto"}) == "refused\nsigsegv 299999 True\n"
    finally:
        copy.unlink()


def test_install_by_move_is_refused(snapshot_path: Path) -> None:
    code = """
    import sys, lazymem
    lazymem.open(sys.argv[1], backend="sigsegv", install="move")
    """
    done = run_child(code, snapshot_path)
    assert "BackendUnavailable" in done.stderr
    assert "needs userfaultfd" in done.stderr
