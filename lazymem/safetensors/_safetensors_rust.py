# SPDX-License-Identifier: Apache-2.0
"""`safetensors._safetensors_rust`, for code that imports from there: what reads is lazymem's."""

from __future__ import annotations

from typing import Any

from . import package
from .errors import SafetensorError
from .handle import safe_open
from .handle import safe_open_handle as _safe_open_handle
from .memory import deserialize

__all__ = ["SafetensorError", "_safe_open_handle", "deserialize", "safe_open"]


def __getattr__(name: str) -> Any:
    return package.attribute("_safetensors_rust", name)
