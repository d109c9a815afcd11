# SPDX-License-Identifier: Apache-2.0
"""Paths and URLs as text: what is shown of them, and that names of others' making lead nowhere else."""

from __future__ import annotations

import pytest

from lazymem.errors import OptionError
from lazymem.store import locations


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/a?b#c@d", "/a?b#c@d"),
        ("s3://bucket/a?b#c/@d", "s3://bucket/a?b#c/@d"),
        ("s3://id:secret@bucket/key", "s3://bucket/key"),
        ("https://me:secret@host:9/x/y.lzm?X-Amz-Signature=secret", "https://host:9/x/y.lzm"),
        ("HTTPS://secret@host/x#y", "https://host/x#y"),
        ("ftp://me:secret@host/x?sig=secret", "ftp://host/x"),
        (
            "abfss://container@account.dfs.core.windows.net/x",
            "abfss://container@account.dfs.core.windows.net/x",
        ),
    ],
)
def test_display_keeps_what_names_the_place_and_no_secret(location: str, shown: str) -> None:
    assert locations.display(location) == shown
    assert "secret" not in locations.display(location)


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("/a", "b", "/a/b"),
        ("s3://bucket/a/", "b?c", "s3://bucket/a/b?c"),
        ("s3://bucket", "b", "s3://bucket/b"),
        ("https://h/a/?sig=1", "b.safetensors", "https://h/a/b.safetensors?sig=1"),
        ("https://h/a/", "%2e%2e", "https://h/a/%252e%252e"),
        ("https://h/a/", "b?c#d", "https://h/a/b%3Fc%23d"),
    ],
)
def test_join_takes_the_name_as_a_name(folder: str, name: str, joined: str) -> None:
    assert locations.join(folder, name) == joined


@pytest.mark.parametrize(
    ("location", "folder", "name"),
    [
        ("/a/b", "/a", "b"),
        ("s3://bucket/a/b?c", "s3://bucket/a/", "b?c"),
        ("s3://bucket/a", "s3://bucket/", "a"),
        ("https://h/a/b.npy?sig=1/2", "https://h/a/?sig=1/2", "b.npy"),
    ],
)
def test_parent_and_name(location: str, folder: str, name: str) -> None:
    assert locations.parent(location) == folder
    assert locations.name_of(location) == name


def test_file_urls_are_paths() -> None:
    assert locations.scheme_of("FILE:///a") is None
    assert locations.local_path("file:///a%20b") == "/a b"
    assert locations.local_path("file://localhost/a") == "/a"
    with pytest.raises(OptionError, match="names a host"):
        locations.local_path("file://host/a")
