# SPDX-License-Identifier: Apache-2.0
"""What a caller can choose, as frozen dataclasses; the only reader of the environment.

Imports nothing of lazymem but the errors.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from .errors import OptionError

KIB: Final = 1024
MIB: Final = 1024 * KIB

MIN_CHUNK_SIZE: Final = 64 * KIB  # the largest page size Linux uses on machines we run on
MAX_CHUNK_SIZE: Final = 64 * MIB
#: 2 MiB is one huge page on x86-64 and arm64; see benchmarks/README.md for the curve.
DEFAULT_CHUNK_SIZE: Final = 2 * MIB

#: Bytes to run ahead of a sequential scan: of local files, and over a network, where several requests are to
#: be under way; see benchmarks/README.md.
LOCAL_READAHEAD: Final = 8 * MIB
REMOTE_READAHEAD: Final = 32 * MIB

CODECS: Final = ("none", "lz4", "zstd")
BACKENDS: Final = ("auto", "uffd", "uffd-user", "sigsegv", "map", "eager")
MODES: Final = ("r", "c")
INSTALLS: Final = ("auto", "copy", "move")
FORKS: Final = ("inherit", "drop")


def process_environment() -> dict[str, str]:
    """The environment of this process, for a process that it starts."""
    return dict(os.environ)


def cpu_count() -> int:
    """Number of processors this process may run on (its affinity, not the machine's size)."""
    return len(os.sched_getaffinity(0))


def check_chunk_size(value: int) -> int:
    """Return `value` if it is an allowed chunk size in bytes, else raise `OptionError`."""
    _whole("chunk_size", value)
    if not MIN_CHUNK_SIZE <= value <= MAX_CHUNK_SIZE or value & (value - 1):
        raise OptionError(
            f"chunk_size is {value}; it must be a power of two from {MIN_CHUNK_SIZE} (64 KiB) "
            f"to {MAX_CHUNK_SIZE} (64 MiB)"
        )
    return value


def _whole(name: str, value: Any) -> None:
    # numpy's integers count; a bool is an int to Python, but here a mistake.
    try:
        operator.index(value)
    except TypeError:
        whole = False
    else:
        whole = not isinstance(value, bool)
    if not whole:
        raise OptionError(f"{name} is {value!r}; it must be a whole number")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def _chosen(env: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The variable's value, checked under its own name; the first of `allowed` where it is unset or empty."""
    return _choice(name, env.get(name) or allowed[0], allowed)


def check_threads(value: int, name: str = "threads") -> int:
    """Return `value` if it is an allowed number of threads, else raise `OptionError`."""
    _whole(name, value)
    if not 1 <= value <= 256:
        raise OptionError(f"{name} is {value}; it must be from 1 to 256")
    return value


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a snapshot is shown in memory.

    mode: "r" (writing is an error) or "c" (copy-on-write: private, never written back).
    backend: "auto"; "uffd" (userfaultfd, kernel-context faults too); "uffd-user" (userfaultfd,
        user-mode faults only); "sigsegv" (protected pages, where userfaultfd is refused; user-mode
        touches only, by handlers of SIGSEGV and SIGBUS: install others, such as faulthandler's, before);
        "map" (plain file mapping, uncompressed local files only);
        "eager" (read everything at open).
    install: "auto", "copy" (UFFDIO_COPY) or "move" (UFFDIO_MOVE of whole huge pages).
    threads: resolver threads, or None for one per processor (2 to 8). Decided by the first
        snapshot that a process has open; later ones share its engine.
    chunk_size: bytes fetched at once where a container is read in place and not mapped.
    readahead: chunks to populate ahead of a sequential scan, within the array it reads; 0: none;
        None: 8 MiB, but at least one, or 32 MiB over a network.
    fork: what child processes get of the memory. "inherit": all of it, as lazy as here, where the child was
        made by fork (os.fork, multiprocessing, subprocess). "drop": none, however the child was made; its
        fork copies no page tables and starts no threads, touching an array there is SIGSEGV, and whatever
        else uses the snapshot there raises `SnapshotClosed`. For who has children that skip fork's
        handlers (a bare clone system call): with "inherit" they would read zeros.
    """

    mode: str = "r"
    backend: str = "auto"
    install: str = "auto"
    threads: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    readahead: int | None = None
    fork: str = "inherit"

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("fork", self.fork, FORKS)
        _choice("backend", self.backend, BACKENDS)
        _choice("install", self.install, INSTALLS)
        check_chunk_size(self.chunk_size)
        if self.threads is not None:
            check_threads(self.threads)
        if self.readahead is not None:
            _whole("readahead", self.readahead)
        if self.readahead is not None and not 0 <= self.readahead <= 4096:
            raise OptionError(f"readahead is {self.readahead}; it must be from 0 to 4096 chunks")

    @classmethod
    def from_environment(
        cls,
        *,
        mode: str = "r",
        backend: str | None = None,
        install: str | None = None,
        threads: int | None = None,
        chunk_size: int | None = None,
        readahead: int | None = None,
        fork: str = "inherit",
        environ: Mapping[str, str] | None = None,
    ) -> OpenOptions:
        """What the caller gave, else LAZYMEM_BACKEND, LAZYMEM_INSTALL, LAZYMEM_THREADS, if not empty."""
        env = os.environ if environ is None else environ
        if threads is None and env.get("LAZYMEM_THREADS"):
            try:
                threads = check_threads(int(env["LAZYMEM_THREADS"]), "LAZYMEM_THREADS")
            except ValueError:
                raise OptionError(
                    f"LAZYMEM_THREADS is {env['LAZYMEM_THREADS']!r}; it must be a number from 1 to 256"
                ) from None
        return cls(
            mode=mode,
            backend=backend if backend is not None else _chosen(env, "LAZYMEM_BACKEND", BACKENDS),
            install=install if install is not None else _chosen(env, "LAZYMEM_INSTALL", INSTALLS),
            threads=threads,
            chunk_size=chunk_size if chunk_size is not None else DEFAULT_CHUNK_SIZE,
            readahead=readahead,
            fork=fork,
        )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a snapshot file is written.

    codec: "none", "lz4" or "zstd". level: the codec's own level; None takes zstd 3, lz4 1.
    planes: split floating-point chunks into byte planes, or float planes, before compression: True (where
        the width fits), False, or None (per chunk, where a sample says that it pays). With zstd and no level
        planes are stored as literals, without matches, unless that is more than 1 % larger.
    threads: compressing threads; None takes one per processor.
    """

    codec: str = "zstd"
    level: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    planes: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _choice("codec", self.codec, CODECS)
        check_chunk_size(self.chunk_size)
        if self.threads is not None:
            check_threads(self.threads)
        if self.planes is not None and not isinstance(self.planes, bool):
            raise OptionError(f"planes is {self.planes!r}; it must be True, False or None")
        if self.level is not None:
            _whole("level", self.level)
        low, high = {"none": (0, 0), "lz4": (1, 12), "zstd": (-50, 22)}[self.codec]
        if self.level is not None and not low <= self.level <= high:
            raise OptionError(f"level is {self.level}; codec {self.codec} takes {low} to {high}")


#: What a region asks the fetcher for; see benchmarks/README.md.
DEFAULT_COALESCE_GAP: Final = 256 * KIB
DEFAULT_COALESCE_SIZE: Final = 8 * MIB
DEFAULT_CACHE_SIZE: Final = 16 << 30
CLIENTS: Final = ("auto", "http", "boto3", "obstore")

# Other libraries' names for the same things (s3fs, obstore, polars, botocore), so that a dict which
# works there works here.
_ALIASES: Final = {
    "key": "access_key_id",
    "aws_access_key_id": "access_key_id",
    "secret": "secret_access_key",
    "aws_secret_access_key": "secret_access_key",
    "token": "session_token",
    "aws_session_token": "session_token",
    "aws_token": "session_token",
    "endpoint": "endpoint_url",
    "aws_endpoint": "endpoint_url",
    "aws_endpoint_url": "endpoint_url",
    "region_name": "region",
    "aws_region": "region",
    "profile_name": "profile",
    "anon": "anonymous",
    "skip_signature": "anonymous",
    "aws_skip_signature": "anonymous",
    "verify": "ca_bundle",
}
_SECRET: Final = ("access_key_id", "secret_access_key", "session_token", "headers", "environment")
# What clients of object stores read from the environment; captured at open, because the fetcher was
# perhaps started before it was set.
_CAPTURED_PREFIXES: Final = ("AWS_", "GOOGLE_", "AZURE_", "BOTO")
_CAPTURED: Final = frozenset(
    name
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    for name in (proxy, proxy.lower())
) | {"HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}


def _captured(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in env.items() if name in _CAPTURED or name.startswith(_CAPTURED_PREFIXES)
    }


#: Seconds that memory waits for another pager when its own has died.
_PAGER_TIMEOUT: Final = 60.0


def pager_timeout() -> float:
    """LAZYMEM_PAGER_TIMEOUT, if not empty. Raises `OptionError`."""
    given = os.environ.get("LAZYMEM_PAGER_TIMEOUT") or str(_PAGER_TIMEOUT)
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 86400.0:
        raise OptionError(f"LAZYMEM_PAGER_TIMEOUT is {given!r}; it must be seconds from 0 to 86400")
    return seconds


_environment_lock = threading.RLock()


def _renew_environment_lock() -> None:
    global _environment_lock
    _environment_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_environment_lock)  # its holder may not exist in the child


@contextlib.contextmanager
def environment_as(captured: Mapping[str, str]) -> Iterator[None]:
    """For clients of stores, which read os.environ themselves: in the block it is as it was at open.

    captured: `StoreOptions.environment`. One block at a time in a process. Where nothing differs nothing
    is touched; only the fetcher of an application that changed its environment meanwhile sees a change.
    """
    with _environment_lock:
        if _captured(os.environ) == dict(captured):
            yield
            return
        before = {name: os.environ.get(name) for name in captured.keys() | _captured(os.environ).keys()}
        try:
            _set_environment({name: captured.get(name) for name in before})
            yield
        finally:
            _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How remote stores are reached. What is None is found as boto3 finds it.

    endpoint_url, region, profile, access_key_id, secret_access_key, session_token: as in boto3.
    anonymous: send no credentials. addressing_style: "auto", "path" or "virtual".
    ca_bundle: a file of certificates to trust; False: trust any (for experiments only).
    headers: sent with every request to http(s) URLs.
    client: what moves the bytes: "auto", "http" (http.client), "boto3" or "obstore".
    timeout: seconds after which a range that was tried again and again is given up.
    attempt_timeout: seconds without a byte after which one attempt is given up.
    concurrency: requests at a time; None adapts it. hedge: ask a second time where an answer is late.
    coalesce_gap: ranges at most this many bytes apart become one request.
    coalesce_size: but never of more bytes than this (one chunk is always one request).
    cache: a directory for stored chunks, None: no cache. cache_size: its limit in bytes.
    environment: the variables that clients of stores read, as they were at open.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    anonymous: bool = False
    addressing_style: str = "auto"
    ca_bundle: str | bool | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    client: str = "auto"
    timeout: float = 60.0
    attempt_timeout: float = 10.0
    concurrency: int | None = None
    hedge: bool = True
    coalesce_gap: int = DEFAULT_COALESCE_GAP
    coalesce_size: int = DEFAULT_COALESCE_SIZE
    cache: str | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("endpoint_url", "region", "profile", "access_key_id", "secret_access_key",
                     "session_token", "cache"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise OptionError(f"{name} is a {type(value).__name__}; it must be a string")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise OptionError("access_key_id and secret_access_key belong together; give both or neither")
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise OptionError(
                f"endpoint_url is {self.endpoint_url!r}; it must begin with http:// or https://"
            )
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise OptionError("endpoint_url carries a user; give access_key_id and secret_access_key instead")
        for name in ("anonymous", "hedge"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        _choice("addressing_style", self.addressing_style, ("auto", "path", "virtual"))
        _choice("client", self.client, CLIENTS)
        for name, low, high in (("timeout", 0.1, 86400.0), ("attempt_timeout", 0.1, 3600.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise OptionError(f"{name} is {value!r}; it must be from {low} to {high} seconds")
        limits = {
            "concurrency": (1, 256),
            "coalesce_gap": (0, 64 * MIB),
            "coalesce_size": (0, 64 * MIB),
            "cache_size": (0, 1 << 60),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is None and name == "concurrency":
                continue
            _whole(name, value)
            if not least <= value <= most:
                raise OptionError(f"{name} is {value}; it must be from {least} to {most}")
        for name in ("headers", "environment"):
            given = getattr(self, name)
            if not given and type(given) is dict:  # mostly; and Mapping's own check takes its time
                continue
            if not isinstance(given, Mapping) or not all(
                isinstance(text, str) for pair in given.items() for text in pair
            ):
                raise OptionError(f"{name} must be a mapping of strings to strings")

    @classmethod
    def from_environment(
        cls,
        storage_options: Mapping[str, Any] | None = None,
        *,
        cache: str | os.PathLike[str] | bool | None = None,
        environ: Mapping[str, str] | None = None,
        is_local: bool = False,
    ) -> StoreOptions:
        """What the caller gave, else LAZYMEM_CACHE_DIR, LAZYMEM_CACHE_SIZE, LAZYMEM_TIMEOUT.

        cache: a directory; True: LAZYMEM_CACHE_DIR, else ~/.cache/lazymem; False: none; None: as the
        environment says. is_local: for a path, which leads to no store, so that the variables of stores'
        clients are not looked at. Raises `OptionError`, also for a storage option that does not exist.
        """
        env = os.environ if environ is None else environ
        given = _flatten(storage_options) if storage_options else {}
        for name, variable, convert in (
            ("cache_size", "LAZYMEM_CACHE_SIZE", int),
            ("timeout", "LAZYMEM_TIMEOUT", float),
        ):
            if name not in given and variable in env:
                try:
                    given[name] = convert(env[variable])
                except ValueError:
                    raise OptionError(f"{variable} is {env[variable]!r}; it must be a number") from None
        if cache is not None or "cache" not in given:
            given["cache"] = _cache_directory(cache, env)
        if not is_local:
            given.setdefault("environment", _captured(env))
        return cls(**given)

    def public(self) -> dict[str, Any]:
        """The options that differ from the defaults and are no secrets: what a pickle may carry."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in _SECRET and getattr(self, one.name) != one.default
        }

    def to_json(self) -> dict[str, Any]:
        """All options, secrets too: for the fetcher, over a socket that nobody else can read."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _flatten(storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Aliases resolved, s3fs's `client_kwargs` unpacked, unknown names refused."""
    if not isinstance(storage_options, Mapping):
        raise OptionError(f"storage_options is a {type(storage_options).__name__}; it must be a mapping")
    known = {one.name for one in fields(StoreOptions)}
    flat: dict[str, Any] = {}
    nested = storage_options.get("client_kwargs") or {}
    for source in (nested, storage_options):
        for name, value in source.items():
            if name == "client_kwargs":
                continue
            real = _ALIASES.get(name, name)
            if real not in known:
                choice = ", ".join(sorted(known - {"environment"}))
                raise OptionError(f"storage option {name!r} is unknown; there are {choice}")
            if name == "verify" and value is True:
                continue
            flat[real] = value
    return flat


def _cache_directory(cache: str | os.PathLike[str] | bool | None, env: Mapping[str, str]) -> str | None:
    if cache is False:
        return None
    if cache is None or cache is True:
        chosen = env.get("LAZYMEM_CACHE_DIR")
        if chosen or cache is None:
            return chosen or None
        base = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or "/", ".cache")
        return os.path.join(base, "lazymem")
    path = os.fspath(cache)
    if not isinstance(path, str) or not path:
        raise OptionError(f"cache is {cache!r}; it must be a directory, True, False or None")
    return os.path.abspath(path)
