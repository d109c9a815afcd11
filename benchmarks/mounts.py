# SPDX-License-Identifier: Apache-2.0
"""The kernel's own compressed file systems as contenders: squashfs and EROFS images, mounted read-only.

The same bytes as everybody's, as one plain file of the image. Images lie in the data folder; mounts live no
longer than the question, and are seen by this process and its children only, so that they end with it
whatever ends it.

The image stays in the page cache, as everybody's files do. The mounted file has pages of its own there: what
has been decompressed. Each measurement forgets those first, and sees to it that they are gone.
"""

from __future__ import annotations

import ctypes
import gzip
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from .bounds import Bytes
from .data import Data
from .harness import CaseFailed
from .page_cache import cached_share, evict
from .question import Settings

_CLONE_NEWNS: Final = 0x00020000


@dataclass(frozen=True)
class Image:
    """A way to pack. block: bytes that are compressed together (EROFS: the most that they become)."""

    kind: str
    system: str
    codec: str
    block: int
    level: str = ""

    @property
    def label(self) -> str:
        return f"{self.system} {self.codec} {self.block >> 10} KiB {self.kind}"


#: Defaults first: squashfs packs 128 KiB, EROFS into 4 KiB. lz4 is for what it shrinks, as elsewhere.
IMAGES: Final = (
    Image("bf16", "squashfs", "zstd", 128 << 10, "3"),
    Image("bf16", "squashfs", "zstd", 1 << 20, "3"),
    Image("bf16", "erofs", "zstd", 64 << 10, "level=3"),
    Image("smooth", "squashfs", "zstd", 128 << 10, "3"),
    Image("smooth", "squashfs", "zstd", 1 << 20, "3"),
    Image("smooth", "erofs", "lz4", 4 << 10),
    Image("smooth", "erofs", "lz4", 64 << 10),
    Image("smooth", "erofs", "lz4hc", 64 << 10),
)
#: One of each.
_TINY: Final = (IMAGES[0], IMAGES[5])


@dataclass(frozen=True)
class Mounted:
    """An image that is mounted: `file` is the array's bytes in it."""

    image: Image
    path: Path
    file: Path


class _Refused(Exception):
    """Why an image cannot be had, in words."""


def mounted(data: Data, settings: Settings, question: str) -> Iterator[Mounted]:
    """All images that can be had here, mounted until `settings.stack` is closed.

    What cannot be had is left out with a line in `settings.skipped`.
    """
    if os.geteuid() != 0:
        settings.skipped.append(f"{question}: squashfs and EROFS left out, mounting them needs root")
        return
    reasons: dict[str, str] = {}  # one line for each cause
    for image in _TINY if settings.tiny else IMAGES:
        try:
            tool = _tool(image)
            path = data.made(_file_name(image), partial(_pack, data, image, tool))
            yield Mounted(image, path, _mount(image, path, data.raw(image.kind).name, settings))
        except (_Refused, CaseFailed) as error:
            reasons.setdefault(f"{image.system} {image.codec}", str(error).splitlines()[-1])
    settings.skipped.extend(f"{question}: {name} left out, {reason}" for name, reason in reasons.items())


def fresh(mount: Mounted, random: bool = False) -> Bytes:
    """The mounted file, mapped, with nothing of it decompressed yet. random: no read-ahead, madvise."""
    evict(mount.file)
    share = cached_share(mount.file)
    if share > 0:
        raise ValueError(f"{share:.0%} of the mounted file was still in the page cache")
    view = np.memmap(mount.file, np.uint8, "r")
    if random:
        view._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return view


def squashfs_decompressors() -> str:
    """How this kernel decompresses squashfs: "single" (one block at a time), "multi", "percpu", "unknown"."""
    try:
        config = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        return "unknown"
    ways = {"SINGLE": "single", "MULTI": "multi", "MULTI_PERCPU": "percpu"}
    found = [way for name, way in ways.items() if f"CONFIG_SQUASHFS_DECOMP_{name}=y" in config.splitlines()]
    return ", ".join(found) or "unknown"


def _file_name(image: Image) -> str:
    return f"{image.kind}-{image.codec}-{image.block >> 10}k.{image.system}"


def _tool(image: Image) -> str:
    name, package = {
        "squashfs": ("mksquashfs", "squashfs-tools"),
        "erofs": ("mkfs.erofs", "erofs-utils"),
    }[image.system]
    tool = shutil.which(name)
    if tool is None:
        raise _Refused(f"{name} is not installed (Debian: {package})")
    if image.system == "erofs":
        listed = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
        words = (listed.stdout + listed.stderr).replace(",", " ").split()
        if image.codec not in words:
            raise _Refused(f"this {name} does not have {image.codec}")
    return tool


def _pack(data: Data, image: Image, tool: str, target: Path) -> None:
    raw = data.raw(image.kind)
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        os.link(raw, Path(folder) / raw.name)
        if image.system == "squashfs":
            words = ["-comp", image.codec, "-Xcompression-level", image.level, "-b", str(image.block)]
            command = [tool, folder, str(target), *words, "-noappend", "-no-progress", "-quiet"]
        else:
            codec = f"-z{image.codec}" + (f",{image.level}" if image.level else "")
            command = [tool, codec, f"-C{image.block}", "--quiet", str(target), folder]
        _run(command)


def _mount(image: Image, path: Path, name: str, settings: Settings) -> Path:
    _keep_to_ourselves()
    folder = settings.stack.enter_context(tempfile.TemporaryDirectory(prefix="lazymem-mount-"))
    words = ["mount", "-t", image.system, str(path), folder, "-o"]
    try:  # as many decompressors as this kernel can have, where it lets one choose
        _run([*words, "loop,ro,threads=multi" if image.system == "squashfs" else "loop,ro"])
    except _Refused:
        _run([*words, "loop,ro"])
    settings.stack.callback(_unmount, folder)  # the loop device goes with the mount
    return Path(folder) / name


def _unmount(folder: str) -> None:
    for words in (["umount"], ["umount", "--lazy"]):
        if subprocess.run([*words, folder], capture_output=True, check=False).returncode == 0:
            return


def _keep_to_ourselves() -> None:
    """Mounts from here on belong to this process and its children. Where that is refused, to all."""
    unshare: Callable[[int], int] = ctypes.CDLL(None).unshare
    if unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _Refused(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise _Refused(f"{Path(command[0]).name} failed: {said[-1] if said else done.returncode}")
