# SPDX-License-Identifier: Apache-2.0
"""What `install` puts in place: lazymem's functions and classes over again, as objects nobody else holds.

So that taking them away can tell them from what a module imported from here on purpose. They are names of
this module, which pickle finds them by, in any process, whether lazymem is installed there or not.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from . import handle

#: Name here -> module of this package, and name there.
_FUNCTIONS: Final = {
    "deserialize": ("memory", "deserialize"),
    "numpy_load_file": ("numpy", "load_file"),
    "numpy_load": ("numpy", "load"),
    "torch_load_file": ("torch", "load_file"),
    "torch_load": ("torch", "load"),
    "torch_load_model": ("torch", "load_model"),
}


class safe_open(handle.safe_open):
    __slots__ = ()
    __doc__ = handle.safe_open.__doc__


class safe_open_handle(handle.safe_open_handle):
    __slots__ = ()
    __doc__ = handle.safe_open_handle.__doc__


def __getattr__(name: str) -> Any:
    # Made when they are asked for, since those of torch import torch.
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _FUNCTIONS[name]
    function = getattr(importlib.import_module(f"{__package__}.{module}"), original)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    call.__module__, call.__qualname__ = __name__, name
    # One for each name, whoever asks first.
    return globals().setdefault(name, call)
