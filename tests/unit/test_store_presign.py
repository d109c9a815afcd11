# SPDX-License-Identifier: Apache-2.0
"""Signed URLs that are made without a botocore client: botocore's own, to the letter; or none."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from lazymem.options import StoreOptions
from lazymem.store import presign
from lazymem.store.aws import Session
from lazymem.store.presign import Facts

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG="}
AT = "http://localhost:9000"


def options(tmp_path: Path, environment: dict[str, str] | None = None, **given: str) -> StoreOptions:
    """In a home without configuration."""
    env = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true", **(environment or {})}
    return replace(StoreOptions(**given), environment=env)  # type: ignore[arg-type]


def parts(url: str) -> tuple[str, list[str]]:
    """The order of a query's parameters means nothing."""
    path, _, query = url.partition("?")
    return path, sorted(query.split("&"))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "key", ["model.lzm", "a/b/c d+e.bin", "ä€/=&?#%25", "tilde~star*(x)!'", "a//b", "-._~/$,:;@"]
)
@pytest.mark.parametrize(
    ("environment", "given"),
    [
        (KEYS, {"endpoint_url": AT}),
        (KEYS, {"endpoint_url": AT + "/", "region": "eu-west-3"}),
        ({**KEYS, "AWS_ENDPOINT_URL": "https://s3.example.org"}, {}),
        ({**KEYS, "AWS_ENDPOINT_URL": "https://minio.example.org:443", "AWS_REGION": "eu-west-1"}, {}),
        ({**KEYS, "AWS_ENDPOINT_URL": "http://10.0.0.7:80", "AWS_DEFAULT_REGION": "eu-west-1"}, {}),
        ({**KEYS, "AWS_ENDPOINT_URL": AT, "AWS_ENDPOINT_URL_S3": "http://other:1"}, {}),
        ({**KEYS, "AWS_SESSION_TOKEN": "FwoGZXIvYXdzE+/=="}, {"endpoint_url": AT}),
        (KEYS, {"endpoint_url": AT, "access_key_id": "mine", "secret_access_key": "too"}),
        ({}, {"endpoint_url": AT, "access_key_id": "a", "secret_access_key": "b", "session_token": "c/+"}),
        ({**KEYS, "AWS_CONFIG_FILE": "/dev/null"}, {"endpoint_url": AT, "addressing_style": "path"}),
    ],
)
def test_is_botocores_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    key: str,
    environment: dict[str, str],
    given: dict[str, str],
) -> None:
    wanted = options(tmp_path, environment, **given)
    facts = Facts.of(wanted)
    assert facts is not None
    asked = Session(wanted)
    asked._facts = None
    theirs = asked.sign(method, "bucket-1", key).url
    then = time.strptime(theirs.partition("X-Amz-Date=")[2][:16], "%Y%m%dT%H%M%SZ")
    monkeypatch.setattr(presign.time, "gmtime", lambda: then)  # or the second may change in between
    ours = facts.sign(method, "bucket-1", key, 3600) or ""
    assert parts(ours) == parts(theirs)
    assert Session(wanted).sign(method, "bucket-1", key).url.split("X-Amz-Date")[0] in ours


def test_the_region_that_the_server_named(tmp_path: Path) -> None:
    session = Session(options(tmp_path, KEYS, endpoint_url=AT))
    assert session.learn_region("bucket-1", "eu-north-1")
    signed = session.sign("GET", "bucket-1", "key")
    assert "%2Feu-north-1%2Fs3" in signed.url
    assert signed.region == "eu-north-1"


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        (KEYS, {}),  # AWS itself
        (KEYS, {"endpoint_url": "https://s3.eu-west-1.amazonaws.com"}),
        (KEYS, {"endpoint_url": AT + "/prefix"}),
        ({**KEYS, "AWS_ENDPOINT_URL": "http://user@localhost:9000"}, {}),
        (KEYS, {"endpoint_url": AT, "profile": "work"}),
        (KEYS, {"endpoint_url": AT, "anonymous": True}),
        (KEYS, {"endpoint_url": AT, "addressing_style": "virtual"}),
        (KEYS, {"endpoint_url": AT, "region": "aws-global"}),
        ({**KEYS, "AWS_PROFILE": "work"}, {"endpoint_url": AT}),
        ({**KEYS, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {"endpoint_url": AT}),
        ({**KEYS, "AWS_SOMETHING_NEW": "1"}, {"endpoint_url": AT}),
        ({"AWS_ACCESS_KEY_ID": "only"}, {"endpoint_url": AT}),
        ({}, {"endpoint_url": AT}),
    ],
)
def test_botocore_decides_where_more_has_a_say(
    tmp_path: Path, environment: dict[str, str], given: dict[str, str]
) -> None:
    assert Facts.of(options(tmp_path, environment, **given)) is None


@pytest.mark.parametrize("name", ["config", "credentials"])
def test_botocore_decides_where_there_is_a_configuration(tmp_path: Path, name: str) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / name).write_text("[default]\n")
    assert Facts.of(options(tmp_path, KEYS, endpoint_url=AT)) is None


@pytest.mark.parametrize(
    ("bucket", "key"), [("Old_Bucket", "key"), ("dots.are.special", "key"), ("bucket-1", "/key"), ("b", "k")]
)
def test_names_that_are_not_plain_are_botocores(tmp_path: Path, bucket: str, key: str) -> None:
    facts = Facts.of(options(tmp_path, KEYS, endpoint_url=AT))
    assert facts is not None
    assert facts.sign("GET", bucket, key, 60) is None


def test_keys_do_not_show(tmp_path: Path) -> None:
    shown = repr(Facts.of(options(tmp_path, {**KEYS, "AWS_SESSION_TOKEN": "token"}, endpoint_url=AT)))
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in shown
    assert "token'" not in shown
