# SPDX-License-Identifier: Apache-2.0
"""From one pager to the next, without a client noticing: spaces with their userfaultfds and connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import AccessDenied

if TYPE_CHECKING:
    from ..paging.wire import Ask
    from .server import Server, Session


def give(server: Server, session: Session, ask: Ask) -> None:
    """Hand everything to the pager that asks. Raises `AccessDenied` for another user's."""
    raise AccessDenied("this pager cannot be taken over", url="pager")
