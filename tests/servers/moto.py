# SPDX-License-Identifier: Apache-2.0
"""moto's S3 server: a second implementation, written by other people from the same documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import processes
from .radosgw import Credentials


class Moto:
    """A running server; a context manager. It takes any credentials."""

    credentials = Credentials("ACCESSKEYOFMOTO", "secret/of+moto=")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Moto:
        self.port = processes.free_port()
        log = self._directory / "output.log"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = processes.start(command, log)
        processes.wait_until(lambda: processes.accepts(self.port), [self._process], log)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            processes.stop([self._process])
