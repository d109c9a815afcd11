# SPDX-License-Identifier: Apache-2.0
"""What a test of an S3 store works with: a bucket of its own, and the environment that leads to it."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from .radosgw import Credentials

if TYPE_CHECKING:
    from .proxy import HostileProxy

REGION = "us-east-1"


def s3_client(endpoint: str, credentials: Credentials) -> Any:
    """A boto3 client that has these credentials and looks for no others."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        region_name=REGION,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",  # radosgw refuses aws-chunked trailers
            response_checksum_validation="when_required",
            retries={"max_attempts": 3, "mode": "standard"},
        ),
    )


class Bucket:
    """A fresh bucket; `client` goes to the server directly, whatever `through` says."""

    def __init__(self, endpoint: str, credentials: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
        self.endpoint = endpoint
        self.credentials = credentials
        self._monkeypatch = monkeypatch
        self.client = s3_client(endpoint, credentials)
        self.bucket = f"b{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.bucket)
        self._set_environment()

    @property
    def environment(self) -> dict[str, str]:
        """What leads AWS's clients to the server, and past whatever this machine has configured."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def _set_environment(self) -> None:
        for name in os.environ:
            if name.startswith(("AWS_", "LAZYMEM_CACHE")) or name == "LAZYMEM_TIMEOUT":
                self._monkeypatch.delenv(name)
        for name, value in self.environment.items():
            self._monkeypatch.setenv(name, value)

    def through(self, proxy: HostileProxy) -> None:
        """From now on the environment leads to the proxy."""
        self._monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, data: bytes) -> str:
        """Store an object; its ETag."""
        etag: str = self.client.put_object(Bucket=self.bucket, Key=key, Body=data)["ETag"]
        return etag

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def uploads(self) -> list[str]:
        """Keys of the multipart uploads that were begun and neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def close(self) -> None:
        """Take the objects away: the server keeps them in memory."""
        for upload in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
            self.client.abort_multipart_upload(
                Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        for key in self.keys():
            self.delete(key)
        self.client.delete_bucket(Bucket=self.bucket)
        self.client.close()
