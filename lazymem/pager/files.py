# SPDX-License-Identifier: Apache-2.0
"""Files in memory: what is too long for a packet, or is to outlive the pager."""

from __future__ import annotations

import os


def in_memory(data: bytes) -> int:
    """A memfd that holds `data`, at its beginning."""
    fd = os.memfd_create("lazymem", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
