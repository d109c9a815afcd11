# SPDX-License-Identifier: Apache-2.0
"""Whom to trust: where certificates are looked for, in the order in which S3's and HTTP's clients do."""

from __future__ import annotations

import importlib.util
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import OptionError

# AWS_CA_BUNDLE is not among them: botocore reads it, together with its configuration file.
_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


def bundle_of(option: str | bool | None, environment: Mapping[str, str]) -> str | bool | None:
    """A file or directory of certificates; False: trust anybody; None: whom the system trusts."""
    if option is not None:
        return option
    return next((environment[name] for name in _VARIABLES if environment.get(name)), None)


def make_context(bundle: str | bool | None) -> ssl.SSLContext:
    """What `bundle_of` says, as TLS needs it. Raises `OptionError` for a file that is not one."""
    if isinstance(bundle, str):
        is_directory = os.path.isdir(bundle)
        try:
            context = ssl.create_default_context(
                cafile=None if is_directory else bundle, capath=bundle if is_directory else None
            )
        except (OSError, ssl.SSLError) as error:
            said = error.strerror or str(error)
            raise OptionError(
                f"the certificates in {bundle!r} cannot be read ({said}); check ca_bundle, AWS_CA_BUNDLE and "
                f"{', '.join(_VARIABLES)}"
            ) from None
    else:
        context = ssl.create_default_context(cafile=None if _system_has_some() else _bundled())
    if bundle is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


def _system_has_some() -> bool:
    paths = ssl.get_default_verify_paths()
    return paths.cafile is not None or (paths.capath is not None and bool(os.listdir(paths.capath)))


def _bundled() -> str | None:
    """Containers often lack the system's certificates; boto3 works in them, with botocore's own."""
    for package in ("certifi", "botocore"):
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / "cacert.pem" if spec is not None and spec.origin else None
        if path is not None and path.exists():
            return str(path)
    return None
