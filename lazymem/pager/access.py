# SPDX-License-Identifier: Apache-2.0
"""Who may ask a pager, and for what: it reads with its own rights, so it must not read for everybody."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import AccessDenied
from ..store import locations

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel says: when it connected."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return cls(*_CREDENTIALS.unpack(raw))


class Access:
    """snapshots: what anybody who may connect may have; empty: whatever they name, but users other than the
    pager's own, and root, nothing. uids: who may connect besides these two; None: everybody."""

    def __init__(self, snapshots: Iterable[str] = (), uids: Iterable[int] | None = ()) -> None:
        self.snapshots = frozenset(map(canonical, snapshots))
        self._uids = None if uids is None else frozenset(uids)

    @property
    def mode(self) -> int:
        """Of the socket: whom the kernel lets connect at all."""
        return 0o600 if self._uids is not None and not self._uids else 0o666

    def is_ours(self, peer: Peer) -> bool:
        return peer.uid in (0, os.geteuid())

    def check_peer(self, peer: Peer) -> None:
        """Raises `AccessDenied`."""
        if not self.is_ours(peer) and self._uids is not None and peer.uid not in self._uids:
            raise AccessDenied(
                f"this pager does not serve user {peer.uid}; start it with --allow-uid {peer.uid}",
                url="pager",
            )

    def check_snapshot(self, peer: Peer, location: str, *, with_options: bool = False) -> str:
        """The location to open: without links, which the peer may change once they were looked at.

        with_options: the peer says how a URL is reached. Raises `AccessDenied`.
        """
        shown = locations.display(location)
        name = canonical(location)
        if self.snapshots and name not in self.snapshots:
            raise AccessDenied(
                f"{shown}: this pager serves other snapshots; start it with --snapshot {shown}", url=shown
            )
        if not self.snapshots and not self.is_ours(peer):
            raise AccessDenied(
                f"{shown}: a pager reads with its own rights, so for other users it serves only what it was "
                f"told to; start it with --snapshot {shown}",
                url=shown,
            )
        if with_options and not self.is_ours(peer):
            raise AccessDenied(
                f"{shown}: how a URL is reached a pager decides by itself for other users; leave "
                "storage_options out",
                url=shown,
            )
        return name


def canonical(location: str) -> str:
    """One name for one file."""
    if locations.scheme_of(location) is not None:
        return location
    return os.path.realpath(locations.local_path(location))
