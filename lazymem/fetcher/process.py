# SPDX-License-Identifier: Apache-2.0
"""The fetcher's process: two descriptors, the signals, and the loop that hears the engine's questions.

Started by the engine (_native/spawn.c) with a socket as descriptor 3 and the shared memory as 4; see
_native/lazymem.h, "the fetcher". It ends when the socket does, whatever its threads are doing. It says
nothing on the terminal, which is the application's.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import socket
import warnings
from typing import Final, NoReturn

from .. import _native
from ..errors import OptionError
from . import messages
from .messages import Ask, BadMessage
from .scheduler import Scheduler
from .sources import Source, Sources

#: How long the end waits for bytes that were answered and are not in the cache yet.
_LAST_WRITES: Final = 1.0


def main() -> NoReturn:
    """Serve until the socket ends."""
    _be_quiet()
    connection = socket.socket(fileno=_native.FETCH_SOCKET)
    size = os.fstat(_native.FETCH_MEMORY).st_size
    memory = memoryview(mmap.mmap(_native.FETCH_MEMORY, size))
    code = 1  # what is not understood here ends in another process, and another try
    try:
        scheduler = Scheduler(memory, lambda packet: _send(connection, packet))
        scheduler.start()
        _serve(connection, scheduler)
        scheduler.finish(_LAST_WRITES)
        code = 0
    finally:
        os._exit(code)  # without waiting for threads


def _be_quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the application, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    # What the interpreter itself or a library's C code prints would stand in the midst of somebody's output.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _send(connection: socket.socket, packet: bytes) -> None:
    try:
        connection.sendall(packet)  # one packet, all of it or nothing
    except OSError:
        os._exit(0)  # there is nobody to hear it


def _serve(connection: socket.socket, scheduler: Scheduler) -> None:
    """Hear questions until there are no more."""
    sources = Sources()
    while True:
        try:
            packet = connection.recv(_native.FETCH_MESSAGE_MAX + 1)
        except ConnectionError:
            return
        if not packet:
            return
        try:
            ask = messages.unpack(packet)
        except BadMessage:
            continue  # it cannot even be said which question it was
        try:
            _heed(ask, connection, scheduler, sources)
        except (BadMessage, OptionError) as error:
            if ask.kind in (messages.OPEN, messages.RANGE):
                _send(connection, messages.failed(ask, _native.E_OPTION, str(error)))


def _heed(ask: Ask, connection: socket.socket, scheduler: Scheduler, sources: Sources) -> None:
    """Do what a question says, or have it done. Returns at once."""
    if ask.kind in (messages.OPEN, messages.RANGE):
        scheduler.add(ask, sources.get(ask.source))
    elif ask.kind == messages.STATUS:
        status = {"pid": os.getpid(), "sources": len(sources), **scheduler.status()}
        _send(connection, messages.done(ask, text=json.dumps(status)))
    elif ask.kind == messages.PROMOTE:
        scheduler.promote(ask.id)
    elif ask.kind == messages.CANCEL:
        scheduler.cancel(ask.id)
    elif ask.kind == messages.SOURCE:
        _close(sources.tell(ask.source, ask.payload), scheduler)
    elif ask.kind == messages.FORGET:
        _close(sources.forget(ask.source), scheduler)


def _close(source: Source | None, scheduler: Scheduler) -> None:
    if source is not None:
        scheduler.call(source.close)
