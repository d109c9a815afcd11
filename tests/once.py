# SPDX-License-Identifier: Apache-2.0
"""What is made once for a whole test run, whichever of pytest-xdist's workers asks for it first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

#: Where a run that a test starts finds what the outer one has made, and leaves what it makes.
FOLDER = "LAZYMEM_TESTS_ONCE"


def folder_of_the_run(factory: pytest.TempPathFactory) -> Path:
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    folder = factory.getbasetemp()
    if folder.name.startswith("popen-"):  # a worker's own, in the run's
        folder = folder.parent
    return folder / "once"


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name` of this run; `make` writes it, under the path it is given, if nobody has.

    Waits while another worker makes it. Nobody may change it: the other workers' tests have it, too.
    """
    path = folder_of_the_run(factory) / name
    path.parent.mkdir(exist_ok=True)
    with open(path.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back when a worker is killed
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{name}")  # of a test that failed: made over
            make(unfinished)
            unfinished.rename(path)
    return path
