# SPDX-License-Identifier: Apache-2.0
"""Servers that the tests need come from the system's packages: as root they are installed on the spot.

Another user gets a skip that says what to install. For root an install that fails is an error: on the
machine that checks every change, a skip would look like success.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Need:
    """Commands that must be there, and the packages (Debian, Ubuntu) that bring them."""

    packages: tuple[str, ...]
    commands: tuple[str, ...]

    def missing(self) -> list[str]:
        return [command for command in self.commands if which(command) is None]


RADOSGW = Need(
    packages=("radosgw", "ceph-mon", "ceph-osd"),
    commands=("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool"),
)
NGINX = Need(packages=("nginx", "openssl"), commands=("nginx", "openssl"))

#: By fixture, so that what the collected tests use can be installed before the first test's clock runs.
OF_FIXTURE = {"s3_server": RADOSGW, "nginx": NGINX}


def which(command: str) -> str | None:
    """Servers live in sbin, which is not on every user's PATH."""
    return shutil.which(command, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def install(needs: Collection[Need]) -> None:
    """As root, install what is missing; two runs at once wait for one another."""
    if os.geteuid() != 0 or not any(need.missing() for need in needs):
        return
    with open(Path(tempfile.gettempdir()) / f"lazymem-tests-{os.geteuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = [name for need in needs if need.missing() for name in need.packages]
        if packages:
            _apt_get("update", "-q")
            _apt_get("install", "-y", "-q", "--no-install-recommends", *packages)


def demand(need: Need) -> None:
    """Skip the test, or for root raise, if something is missing even now."""
    missing = need.missing()
    if not missing:
        return
    sentence = f"{', '.join(missing)} not found: apt-get install {' '.join(need.packages)}"
    if os.geteuid() != 0:
        pytest.skip(sentence)
    raise RuntimeError(sentence)


def _apt_get(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=300", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"apt-get {' '.join(arguments)} failed:\n{done.stdout[-3000:]}")
