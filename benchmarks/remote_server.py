# SPDX-License-Identifier: Apache-2.0
"""The S3 server of the remote benchmark, the model that lies on it, and the ways to reach it.

The server is the one of the tests (tests/servers): Ceph's gateway with its data in memory, started for
the run. The parent never holds a client: what it asks of the server, children do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from .bounds import Bytes
from .data import NAME, Data, files_of
from .harness import in_child
from .relay import Relay, Traffic

KIND: Final = "bf16"
BUCKET: Final = "models"
_REGION: Final = "us-east-1"
_CHUNK: Final = 2 << 20
_SMALL_CHUNK: Final = 64 << 10


class NoServer(Exception):
    """The sentence that says why there is none."""


@dataclass(frozen=True)
class Place:
    """A way to the server. `relay`: what lies in between and counts, or None."""

    name: str
    text: str
    endpoint: str
    access_key: str
    secret_key: str
    relay: Relay | None = None

    def environment(self) -> dict[str, str]:
        """What leads every S3 client here, and past whatever the machine has configured."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def traffic(self) -> Traffic:
        return self.relay.traffic if self.relay else Traffic(0, 0, 0)

    def client(self) -> Any:
        """A boto3 client with its defaults, but for what this server does not know."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


@dataclass(frozen=True)
class Model:
    """Equal tensors, each a stretch of one long array, in several formats under these keys."""

    data: Data
    count: int

    SAFETENSORS: ClassVar = "model.safetensors"
    SNAPSHOTS: ClassVar = {
        "zstd": ("zstd", _CHUNK),
        "zstd 64K": ("zstd", _SMALL_CHUNK),
        "lz4": ("lz4", _CHUNK),
        "none": ("none", _CHUNK),
    }
    ZARR: ClassVar = "model.zarr"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def tensor_bytes(self) -> int:
        return self.nbytes // self.count

    @property
    def names(self) -> list[str]:
        return [f"{NAME}{number}" for number in range(self.count)]

    def stretch(self, name: str) -> slice:
        """A tensor's bytes in the array."""
        first = int(name.removeprefix(NAME)) * self.tensor_bytes
        return slice(first, first + self.tensor_bytes)

    def header(self) -> bytes:
        """What a safetensors file of the model begins with."""
        tensors = {
            name: {
                "dtype": "BF16",
                "shape": [self.tensor_bytes // 2],
                "data_offsets": [self.stretch(name).start, self.stretch(name).stop],
            }
            for name in self.names
        }
        text = json.dumps(tensors).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def safetensors(self) -> Path:
        raw = self.data.raw(KIND)

        def make(target: Path) -> None:
            with open(target, "wb") as file, open(raw, "rb") as source:
                file.write(self.header())
                shutil.copyfileobj(source, file, 1 << 20)

        return self.data.made(f"{KIND}-{self.count}.safetensors", make)

    def snapshot(self, which: str) -> Path:
        codec, chunk_size = self.SNAPSHOTS[which]
        return self.data.many(KIND, self.count, codec, chunk_size)

    def zarr(self) -> Path:
        return self.data.zarr_group(KIND, self.count, _CHUNK)

    def digest_of(self, names: Sequence[str]) -> int:
        """Of consecutive tensors."""
        return self.data.digest_of(KIND, self.stretch(names[0]).start, self.stretch(names[-1]).stop)

    def touches(self, count: int, length: int) -> list[tuple[str, int]]:
        """Random pieces of `length` bytes: tensor and offset in it. The same ones each time."""
        rng = np.random.default_rng(11)
        pieces = rng.integers(0, self.nbytes // length, count) * length
        return [(f"{NAME}{piece // self.tensor_bytes}", int(piece % self.tensor_bytes)) for piece in pieces]

    def digest_of_touches(self, touches: Sequence[tuple[str, int]], length: int) -> int:
        from .data import digest

        raw = self.data.raw(KIND)

        def compute() -> int:
            array = np.memmap(raw, np.uint8, "r")
            starts = [self.stretch(name).start + offset for name, offset in touches]
            return digest([array[start : start + length] for start in starts])

        value: int = in_child(compute, deadline=60)
        return value


def header_of(first_bytes: bytes | memoryview) -> dict[str, slice]:
    """Where each tensor of a safetensors file lies, from its first bytes (all of the header)."""
    length = int.from_bytes(first_bytes[:8], "little")
    told = json.loads(bytes(first_bytes[8 : 8 + length]))
    base = 8 + length
    return {name: slice(*(base + end for end in one["data_offsets"])) for name, one in told.items()}


def tensors_of(file: Bytes, names: Sequence[str]) -> list[Bytes]:
    """Views of tensors in a whole safetensors file."""
    where = header_of(file[: 8 + int.from_bytes(file[:8].tobytes(), "little")].tobytes())
    return [file[where[name]] for name in names]


@dataclass(frozen=True)
class Server:
    """direct: over loopback. counted: through a relay that only counts. far: with latency."""

    direct: Place
    counted: Place
    far: Place


def start(
    stack: ExitStack,
    files: Callable[[], Mapping[str, Path]],
    memory: tuple[int, str],
    delay: float,
    say: Callable[[str], None],
) -> Server:
    """A server that holds files under their keys, until `stack` ends. Raises `NoServer`.

    files: makes them, once it is known that there can be a server. memory: bytes that server and clients
    take, and a sentence's part that says why.
    """
    try:
        from tests.servers.install import RADOSGW
        from tests.servers.radosgw import RadosGateway
    except ImportError as error:
        raise NoServer(
            f"the server is the one of the tests, which cannot be imported here ({error}); run in a "
            "checkout, after pip install lazymem[test]"
        ) from None
    if missing := RADOSGW.missing():
        raise NoServer(f"{', '.join(missing)} not found: apt-get install {' '.join(RADOSGW.packages)}")
    if (wanted := memory[0] >> 20) > (there := available_mib()):
        raise NoServer(
            f"{memory[1]} server and clients take {wanted} MiB of memory, "
            f"and {there} are available; choose a smaller one with --model-mb"
        )
    made = dict(files())
    say("starting the S3 server")
    size = sum(path.stat().st_size for path in made.values())
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazymem-bench-s3-")))
    try:
        gateway = stack.enter_context(RadosGateway(folder, memory=2 * size + (1 << 30)))
    except (RuntimeError, OSError) as error:
        raise NoServer(f"the S3 server does not start: {error}") from error
    keys = gateway.credentials.access_key, gateway.credentials.secret_key
    direct = Place("loopback", "over loopback", gateway.endpoint, *keys)
    say("uploading the model")
    in_child(lambda: _upload(direct, made), deadline=600)
    relays = [stack.enter_context(Relay(gateway.port, seconds)) for seconds in (0.0, delay)]
    text = f"{1e3 * delay:.0f} ms"
    counted = Place("counted", "through a relay", relays[0].endpoint, *keys, relay=relays[0])
    far = Place(f"+{text}", f"{text} to the first byte", relays[1].endpoint, *keys, relay=relays[1])
    return Server(direct, counted, far)


def files_by_key(model: Model) -> Iterator[tuple[str, Path]]:
    yield Model.SAFETENSORS, model.safetensors()
    for which in Model.SNAPSHOTS:
        yield snapshot_key(which), model.snapshot(which)
    if have("zarr"):
        folder = model.zarr()
        for file in files_of(folder):
            yield f"{Model.ZARR}/{file.relative_to(folder)}", file


def available_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    raise KeyError("MemAvailable")


def snapshot_key(which: str) -> str:
    return f"model-{which.replace(' ', '-')}.lzm"


def have(module: str) -> bool:
    """Whether its package is installed. Imports nothing: this process forks."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _upload(place: Place, files: dict[str, Path]) -> None:
    os.environ.update(place.environment())
    client = place.client()
    client.create_bucket(Bucket=BUCKET)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(client.upload_file, str(path), BUCKET, key) for key, path in files.items()]:
            done.result()
