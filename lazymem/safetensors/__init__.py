# SPDX-License-Identifier: Apache-2.0
"""A drop-in for the package `safetensors`: the same names, on files, folders, snapshots and URLs.

    from lazymem.safetensors import safe_open
    from lazymem.safetensors.torch import load_file, load_model

or `lazymem.safetensors.install()`, and code that imports safetensors itself uses it.

The same call gives the same, with these differences, each on purpose:

- Sources: folders, indexes of shards, .lzm and URLs are opened, too; safetensors' `OSError` for a folder is
  gone. `PermissionError` where it says `FileNotFoundError`, as newer versions do.
- Arguments: unknown keywords are ignored, since newer versions add some; backend "read_file" is "pread".
  Devices may be "meta" and `torch.device`. Handles pickle, by reference.
- numpy arrays are views of the file, copy-on-write, as tensors are: two of one name share their memory.
  So do tensors under backend "pread", which here reads chunk by chunk instead of tensor by tensor.
- float8 comes as ml_dtypes' in numpy, and bfloat16 from `load`, too, and whoever imported ml_dtypes; that
  version raises `AttributeError`, `KeyError` or `TypeError`.
- F4 tensors can be sliced, and had with backend "pread"; slices count pairs as the tensors do.
- Tensors without elements have a storage without an address, and so count as complete.
- A slice that ends before it begins is a `SafetensorError`; safetensors panics or returns garbage.
- Files: a key that stands twice, a tensor that is a JSON list, and shapes that no array can have (more
  than 64 dimensions, 2**63 behind a zero) are errors; a length of -0 is 0; an empty `__metadata__` reads
  as None.
- `load_model` replaces what parameters show instead of copying into them; parameters on the meta device
  become real; tensors that share memory in the model are no error where they do not overlap.
- Errors that are safetensors' are lazymem's as well, and name the file.

What writes (`save_file`, `serialize`, ...) is the package's own, and needs it installed.
"""

from __future__ import annotations

from typing import Any

from . import package
from .errors import SafetensorError
from .handle import safe_open, safe_open_handle
from .installation import Installation, install, uninstall
from .memory import deserialize

_safe_open_handle = safe_open_handle

__all__ = [
    "Installation",
    "SafetensorError",
    "deserialize",
    "install",
    "safe_open",
    "safe_open_handle",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in ("torch", "numpy", "_safetensors_rust"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        return package.installed().__version__
    return package.attribute("", name)
