# SPDX-License-Identifier: Apache-2.0
"""How the fetcher's process is started: its argv. For the application: it imports next to nothing."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Final

from ..errors import OptionError

#: A package without its __init__, which would import numpy and the engine: the fetcher needs neither, and
#: the first touch waits for it to start. argv: the package's directory, then sys.path.
BOOTSTRAP: Final = (
    "import sys, types; sys.path[:] = sys.argv[2:]; "
    "package = types.ModuleType('lazymem'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['lazymem'] = package; "
    "from lazymem.fetcher.process import main; main()"
)


def command() -> list[str]:
    """The fetcher's argv: this interpreter, and the places where this process finds modules.

    The standard library comes first and the working directory not at all: a script's neighbours called
    `queue.py` or `ssl.py` are not what the fetcher wants. Raises `OptionError` where no interpreter is known.
    """
    if not sys.executable:
        raise OptionError(
            "remote snapshots need a Python interpreter to start the fetcher with, and sys.executable is "
            "empty (an embedded interpreter?); set it to the path of one"
        )
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    standard.append(str(Path(standard[1], "lib-dynload")))
    path = [entry for entry in sys.path if entry and isinstance(entry, str)]
    path.sort(key=lambda entry: entry not in standard)  # stable: the rest keeps its order
    return [sys.executable, "-I", "-S", "-c", BOOTSTRAP, str(Path(__file__).parent.parent), *path]
