# SPDX-License-Identifier: Apache-2.0
"""Errors that are lazymem's and safetensors' at once, so that either's `except` catches them.

`SafetensorError` is the installed package's class, or one of the same name where it is not installed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import (
    ArrayNotFound,
    FormatError,
    LazymemError,
    OptionError,
    SnapshotClosed,
    SnapshotNotFound,
    UnsupportedDtype,
    UnsupportedFormat,
)

if TYPE_CHECKING:

    class SafetensorError(Exception):
        """What safetensors raises."""

else:
    try:
        from safetensors import SafetensorError
    except ImportError:

        class SafetensorError(Exception):
            """What safetensors raises; made here because that package is not installed."""


class InvalidFile(FormatError, SafetensorError):
    """A file that breaks its format."""


class UnsupportedFile(UnsupportedFormat, SafetensorError):
    """A file, or a tensor, of a kind that cannot be shown."""


class TensorNotFound(ArrayNotFound, SafetensorError):
    """No tensor of that name is in the file."""


class FileClosed(SnapshotClosed, SafetensorError):
    """The file was closed by leaving its `with` block."""


class InvalidArgument(OptionError, SafetensorError):
    """A framework, device, backend or other option that there is not."""


class InvalidIndex(LazymemError, IndexError, SafetensorError):
    """An index that does not fit the tensor, or is of a kind that slices do not take."""


class UnsupportedTensor(UnsupportedDtype, SafetensorError):
    """The framework has no dtype for the tensor."""


@contextlib.contextmanager
def both_kinds(filename: str | os.PathLike[str] = "") -> Iterator[None]:
    """Raise what safetensors raises for the same mistake; it is lazymem's error, too."""
    prefix = "Error while deserializing header: "
    try:
        yield
    except SafetensorError:
        raise
    except UnsupportedFormat as error:
        raise UnsupportedFile(prefix + str(error), url=error.url, field=error.field) from error
    except FormatError as error:
        raise InvalidFile(prefix + str(error), url=error.url, field=error.field) from error
    except SnapshotNotFound as error:
        if "://" in os.fspath(filename):
            raise
        raise SnapshotNotFound(f"No such file or directory: {os.fspath(filename)}", url=error.url) from error
    except UnsupportedDtype as error:
        raise UnsupportedTensor(str(error)) from error
    except OptionError as error:
        raise InvalidArgument(str(error)) from error
