# SPDX-License-Identifier: Apache-2.0
"""The installed `safetensors` package: what writes, and what only it can do, is its own.

Nothing that reads needs it. It is looked up late, so that importing this package does not demand it.
"""

from __future__ import annotations

import importlib
from typing import Any


def installed(module: str = "") -> Any:
    """The package, or the module of that name in it. Raises `ImportError` that says what to install."""
    name = f"safetensors.{module}" if module else "safetensors"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this part of lazymem.safetensors is the safetensors package's own, and {name} cannot be "
            f"imported ({error}); pip install safetensors"
        ) from error


#: What `install` has replaced, by the package's name for it.
originals: dict[str, Any] = {}


def original(name: str) -> Any:
    """What the package itself calls `name`, whatever `install` has put in its place meanwhile."""
    return originals[name] if name in originals else getattr(installed(), name)


def attribute(module: str, name: str) -> Any:
    """What the module of the package calls `name`: for `__getattr__` of our module of that name."""
    if name.startswith("__"):
        raise AttributeError(f"module 'lazymem.safetensors.{module}' has no attribute {name!r}")
    try:
        return getattr(installed(module), name)
    except AttributeError:
        path = f"lazymem.safetensors.{module}".rstrip(".")
        raise AttributeError(f"module {path!r} has no attribute {name!r}, nor has safetensors") from None
