# SPDX-License-Identifier: Apache-2.0
"""Options that verbs share: how stores are reached, and what may be replaced.

Secrets are refused: a command line is shown to everybody on the machine by ps.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Final

import click

from ..options import StoreOptions

#: What an option of StoreOptions takes, as its annotation says it.
_KINDS: Final = {field.name: str(field.type) for field in fields(StoreOptions)}
_SECRET: Final = re.compile("key|secret|token|password|header|environment", re.IGNORECASE)
_USER: Final = re.compile("://[^/]*@")
_BOOLS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class KeyValue(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "key=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        key, separator, text = str(value).partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text


class StorageOption(click.ParamType[tuple[str, Any]]):
    """KEY=VALUE, an item of storage_options: true and false, and numbers where one is expected."""

    name = "key=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, separator, text = str(value).partition("=")
        if _SECRET.search(key) or _USER.search(text):  # before a message that would repeat it
            shown = repr(key) if separator and key.isidentifier() else "what was given"
            self.fail(
                f"{shown} is, or holds, a secret, and everybody can read a command line; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or name a profile: "
                "-o profile=NAME",
                param,
                ctx,
            )
        if not separator or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        kind = _KINDS.get(key, "str | bool")  # else an alias of another library's, or a mistake
        if "bool" in kind and text.lower() in _BOOLS:
            return key, _BOOLS[text.lower()]
        for part, number in (("int", int), ("float", float)):
            if part in kind:
                try:
                    return key, number(text)
                except ValueError:
                    self.fail(f"{key} is {text!r}; it must be a number", param, ctx)
        return key, text


def _to_dict(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    return dict(pairs)


#: -o KEY=VALUE, which arrives as the dict `storage_options`.
storage_option: Final = click.option(
    "-o",
    "--storage-option",
    "storage_options",
    type=StorageOption(),
    metavar="KEY=VALUE",
    multiple=True,
    callback=_to_dict,
    help="How a store is reached, such as endpoint_url=http://127.0.0.1:9000, region=..., profile=..., "
    "anonymous=true, timeout=30; may be given again. Credentials are found where boto3 finds them.",
)

#: Three flags that arrive as one `overwrite`: True, False or None.
overwrite_option: Final = click.option(
    "--overwrite/--no-overwrite",
    " /--if-none-match",
    default=None,
    help="Replace an existing DST whatever it is, or never (--if-none-match is the same in the words of "
    "object stores); default: if it is a snapshot.",
)
