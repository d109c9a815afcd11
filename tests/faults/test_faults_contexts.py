# SPDX-License-Identifier: Apache-2.0
"""Lazy memory as an argument of system calls, and of code that is not numpy's (contexts.py has the calls).

With full userfaultfd all of them work. Where the kernel's own touches are not served a call fails with
EFAULT, or says honestly how much it did; `lazymem.populate` makes it work on every backend.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lazymem

from ..children import check_child
from .contexts import NAMES, content

#: Backends, and whether the kernel's own touches are served.
BACKENDS = {"uffd": True, "uffd-user": False, "sigsegv": False, "eager": True}

#: Checks that a machine may refuse, how, and why.
REFUSALS = {
    "io_uring": ({"EPERM", "ENOSYS"}, "io_uring is disabled (kernel.io_uring_disabled, seccomp)"),
    "direct": ({"EINVAL"}, "the file system of the temporary directory has no O_DIRECT"),
    "process_vm": ({"EPERM", "ENOSYS"}, "seccomp refuses process_vm_readv"),
    "splice": ({"EPERM", "ENOSYS"}, "seccomp refuses vmsplice"),
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "data.lzm"
    lazymem.build({"data": np.frombuffer(content(), np.uint8)}, path, chunk_size=65536)
    return path


@pytest.fixture(scope="module", params=BACKENDS)
def outcomes(
    request: pytest.FixtureRequest, data_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[str]]]:
    """All checks on one backend, in one child process."""
    code = "import sys; from tests.faults.contexts import main; main(*sys.argv[1:])"
    out = check_child(code, request.param, data_path, tmp_path_factory.mktemp("files"))
    found = json.loads(out)
    if "unavailable" in found:
        pytest.skip(found["unavailable"])
    return request.param, found


@pytest.mark.parametrize("name", NAMES)
def test_call_on_unpopulated_memory_is_right_or_says_that_it_failed(
    outcomes: tuple[str, dict[str, list[str]]], name: str
) -> None:
    backend, found = outcomes
    untouched, begun, populated = found[name]
    for part, (refusals, reason) in REFUSALS.items():
        if part in name and populated in refusals:
            pytest.skip(reason)
    assert populated == "right"
    if "touched" in name or backend == "eager":
        assert (untouched, begun) == ("right", "right")
    elif name == "proc_mem_read_by_another_process":
        assert (untouched, begun) == ("EIO", "short")
    elif BACKENDS[backend]:
        assert (untouched, begun) == ("right", "right")
    else:
        assert untouched == "EFAULT"
        assert begun in ("EFAULT", "short", "right")  # right: all that the call needs lies in the first chunk
