# SPDX-License-Identifier: Apache-2.0
"""Snapshots that many tests share, made once; and the servers, which start when a test asks for one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem._native import engine_counts

from .arrays import CHUNK, make_arrays
from .once import made_once
from .servers import install

if TYPE_CHECKING:
    from .servers.nginx import Nginx
    from .servers.proxy import HostileProxy
    from .servers.radosgw import RadosGateway
    from .servers.s3 import Bucket

# Where no byte code may be kept, each of thousands of child processes would compile lazymem anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

#: What cannot even be imported where a package is missing: new Pythons have no torch.
NEED = {
    "torch": (
        "differential",
        "models",
        "integration/test_safetensors_install.py",
        "integration/test_safetensors_sources.py",
        "unit/test_containers_torch.py",
        "unit/test_torch_tensors.py",
    ),
    "gguf": ("unit/test_containers_gguf.py",),
}
MISSING = [package for package in NEED if find_spec(package) is None]
collect_ignore = [path for package in MISSING for path in NEED[package]]


def pytest_report_header() -> list[str]:
    return [f"not collected, for want of {package}: {', '.join(NEED[package])}" for package in MISSING]


@pytest.fixture
def counts_before() -> tuple[int, int]:
    """Regions and engine threads as the test begins, without what other tests' tracebacks still held."""
    gc.collect()
    return engine_counts()


@pytest.fixture(scope="session")
def arrays() -> dict[str, NDArray[np.generic]]:
    return make_arrays()


@pytest.fixture(scope="session")
def snapshot_path(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[np.generic]]) -> Path:
    """zstd, chunks of 64 KiB: many chunks, many faults."""

    def make(path: Path) -> None:
        lazymem.build(arrays, path, codec="zstd", chunk_size=CHUNK)

    return made_once(tmp_path_factory, "small-chunks.lzm", make)


@pytest.fixture(scope="session")
def huge_path(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[np.generic]]) -> Path:
    """lz4, chunks of 2 MiB: whole huge pages, which can be moved."""

    def make(path: Path) -> None:
        lazymem.build(arrays, path, codec="lz4")

    return made_once(tmp_path_factory, "huge-chunks.lzm", make)


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand chunks, which take a while to populate; the last element of "big" is 7."""

    def make(path: Path) -> None:
        big = np.random.default_rng(4).standard_normal(16_000_000).astype(np.float32)
        big[-1] = 7
        lazymem.build({"big": big, "small": np.arange(9)}, path, chunk_size=CHUNK)

    return made_once(tmp_path_factory, "long.lzm", make)


#: What a way to lazy memory cannot do by its nature (README, *Where it runs*), by the backend that the suite
#: is told to open with. A test says what it needs; what becomes of it where that is missing has tests, too.
#: System calls on memory that nothing has touched are asked of each way by name (test_ways, faults/contexts).
LACKS = {
    "eager": {
        "needs_lazy": "eager reads everything at open: nothing is left to be populated later",
        "needs_userfaultfd": "eager needs no userfaultfd, and has no use for what it can do",
    },
    "sigsegv": {
        "needs_userfaultfd": "sigsegv is what is taken where there is no userfaultfd",
    },
    "uffd-user": {},
    "uffd": {},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`LAZYMEM_BACKEND=WAY pytest tests/integration` runs what that way can do, and says what it cannot."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # or workers wait for the last one
    backend = os.environ.get("LAZYMEM_BACKEND", "auto")
    if backend == "auto":
        return
    lacks = {"needs_mapping": f"backend {backend} maps nothing", **LACKS[backend]}
    for item in items:
        for mark, reason in lacks.items():
            if item.get_closest_marker(mark) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install servers before the first test: a download is not to run against a test's timeout."""
    # Tests have the collector run hundreds of times, accelerate does for each file: each time it would go
    # through all of torch and transformers, for a fifth of a second.
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly:
        used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
        install.install([need for name, need in install.OF_FIXTURE.items() if name in used])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RadosGateway]:
    """A real S3 server, shared by all tests of the session."""
    from .servers.radosgw import RadosGateway

    install.demand(install.RADOSGW)
    with RadosGateway(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


@pytest.fixture
def s3(s3_server: RadosGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A fresh bucket, and an environment in which AWS's clients find it."""
    from .servers.s3 import Bucket

    bucket = Bucket(s3_server.endpoint, s3_server.credentials, monkeypatch)
    yield bucket
    bucket.close()


@pytest.fixture
def proxy(s3_server: RadosGateway) -> Iterator[HostileProxy]:
    """A network between the tests and the server that misbehaves as it is told; see `Bucket.through`."""
    from .servers.proxy import HostileProxy

    with HostileProxy(("127.0.0.1", s3_server.port)) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """A plain web server over a directory, by http and https."""
    from .servers.nginx import Nginx

    install.demand(install.NGINX)
    with Nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server
