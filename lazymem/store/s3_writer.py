# SPDX-License-Identifier: Apache-2.0
"""Writing an object of S3 as a stream: a multipart upload in bounded memory, or one request for a small one.

The object appears when the upload is completed, whole, and that is the last thing done. Any exception before,
a KeyboardInterrupt too, aborts the upload, which takes its parts away. What a killed process leaves behind a
lifecycle rule of the bucket has to remove.

Each part travels with its MD5, which the server compares, and the server's ETag is compared with it again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from ..errors import BuildError, LazymemError
from .aws import Session
from .refusals import Refusal, build_error, refusal_of_response
from .wording import clean

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger("lazymem")

MIB: Final = 1 << 20
PARTS_MOST: Final = 10_000  # S3's limit
#: What parts on their way may hold together, beside the one that is being filled; one always may go.
MEMORY: Final = 48 * MIB
_AT_ONCE: Final = 4
_DAMAGED_MOST: Final = 3  # times a part is sent that arrives damaged
_MD5: Final = re.compile(r'"?([0-9a-f]{32})"?')


def part_size(number: int) -> int:
    """Bytes of the part with this number, from 1: grows so slowly that small uploads need little memory,
    and so fast that 10,000 parts hold 5 TiB."""
    return 8 * MIB + (number - 1) // 9 * MIB


class S3Upload:
    """Implements `store.base.Writer`; a context manager."""

    file: BinaryIO

    def __init__(
        self, url: str, bucket: str, key: str, client: Any, session: Session, *, overwrite: bool
    ) -> None:
        self._url = url
        self._where = {"Bucket": bucket, "Key": key}
        self._client = client
        self._session = session
        self._overwrite = overwrite
        self._upload: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._sending: dict[Future[tuple[int, bytes, str]], int] = {}  # and the bytes that each holds
        self._sent: dict[int, tuple[bytes, str]] = {}  # MD5 and ETag by number
        self._parts = 0
        self.file = cast(BinaryIO, _PartFile(self))

    def __enter__(self) -> S3Upload:
        if not self._overwrite and self._etag() is not None:
            raise self._exists()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._finish(cast(_PartFile, self.file).take())
        except BaseException:
            self._abort()
            raise
        finally:
            self.file.close()
        if exc_type is not None:
            self._abort()

    def send(self, data: bytearray) -> None:
        """Take a full part; blocks while too many are on their way. Raises `BuildError`, `AccessDenied`."""
        if self._upload is None:
            self._begin()
        assert self._pool is not None
        self._parts += 1
        if self._parts > PARTS_MOST:
            raise BuildError(f"{self._url}: does not fit into the {PARTS_MOST} parts of one upload (5 TiB)")
        while self._sending and sum(self._sending.values()) + len(data) > MEMORY:
            self._collect(wait(self._sending, return_when=FIRST_COMPLETED).done)
        self._collect({one for one in self._sending if one.done()})
        self._sending[self._pool.submit(self._send_part, self._parts, data)] = len(data)

    def _collect(self, done: set[Future[tuple[int, bytes, str]]]) -> None:
        for future in done:
            del self._sending[future]
            number, digest, etag = future.result()
            self._sent[number] = digest, etag

    def _begin(self) -> None:
        with self._errors():
            answer = self._client.create_multipart_upload(
                **self._where, ContentType="application/octet-stream"
            )
            self._upload = answer["UploadId"]
        self._pool = ThreadPoolExecutor(_AT_ONCE, "lazymem-upload")

    def _send_part(self, number: int, data: bytearray) -> tuple[int, bytes, str]:
        def send(md5: str) -> Any:
            return self._client.upload_part(
                **self._where, UploadId=self._upload, PartNumber=number, Body=data, ContentMD5=md5
            )

        with self._errors():
            digest, answer = self._send_checked(send, data)
            return number, digest, answer["ETag"]

    def _send_checked(self, send: Callable[[str], Any], data: bytearray) -> tuple[bytes, Any]:
        """Send bytes with their MD5, again if they arrive damaged."""
        from botocore.exceptions import ClientError

        digest = hashlib.md5(data, usedforsecurity=False).digest()
        for sent in range(1, _DAMAGED_MOST + 1):
            try:
                answer = send(base64.b64encode(digest).decode())
            except ClientError as error:
                if refusal_of_response(error.response).code != "BadDigest" or sent == _DAMAGED_MOST:
                    raise
            else:
                self._check_etag(answer, digest)
                return digest, answer
        raise AssertionError

    def _check_etag(self, answer: Any, digest: bytes) -> None:
        match = _MD5.fullmatch(answer.get("ETag") or "")
        # Where the server encrypts with a key of KMS or of the customer, the ETag is no MD5.
        encrypted = answer.get("ServerSideEncryption") not in (None, "AES256")
        if match and not encrypted and "SSECustomerAlgorithm" not in answer and match[1] != digest.hex():
            raise BuildError(f"{self._url}: the store has other bytes than were sent to it; try again")

    def _finish(self, rest: bytearray) -> None:
        if self._upload is None:
            self._put(rest)
            return
        if rest:
            self.send(rest)
        self._collect(set(wait(self._sending).done))
        assert self._pool is not None
        self._pool.shutdown()
        self._complete()
        self._upload = None

    def _put(self, data: bytearray) -> None:
        def send(md5: str) -> Any:
            given = {
                **self._where,
                "Body": data,
                "ContentMD5": md5,
                "ContentType": "application/octet-stream",
            }
            return self._client.put_object(**given, **self._condition)

        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        with self._publishing(etag):
            self._send_checked(send, data)

    def _complete(self) -> None:
        numbers = sorted(self._sent)
        parts = [{"PartNumber": number, "ETag": self._sent[number][1]} for number in numbers]
        digests = b"".join(self._sent[number][0] for number in numbers)
        etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"'
        if not self._overwrite and self._etag() is not None:
            # Again, as late as can be: some servers (Ceph) ignore the condition below on this one request.
            raise self._exists()
        with self._publishing(etag):
            self._client.complete_multipart_upload(
                **self._where, UploadId=self._upload, MultipartUpload={"Parts": parts}, **self._condition
            )

    @property
    def _condition(self) -> dict[str, str]:
        return {} if self._overwrite else {"IfNoneMatch": "*"}

    @contextlib.contextmanager
    def _publishing(self, etag: str) -> Iterator[None]:
        """Around the request that makes the object appear. etag: what it has if it did."""
        from botocore.exceptions import ClientError

        with self._errors():
            try:
                yield
            except ClientError as error:
                refusal = refusal_of_response(error.response)
                retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
                conflict = refusal.status == 412 or refusal.code == "NoSuchUpload"
                if conflict and retried and self._etag() == etag:
                    return  # an earlier try had succeeded, but its answer was lost
                problem = None if self._overwrite else self._conflict(refusal)
                if problem is not None:
                    raise problem from None
                raise

    def _conflict(self, refusal: Refusal) -> BuildError | None:
        if refusal.status == 412:
            return self._exists()
        if refusal.code == "ConditionalRequestConflict":
            return BuildError(f"{self._url}: somebody else is writing it at this moment; try again")
        if refusal.status == 501:
            return BuildError(
                f"{self._url}: the store cannot write only where nothing is ({refusal}); allow overwriting, "
                "and choose a name that nobody else writes"
            )
        return None

    def _etag(self) -> str | None:
        """The ETag of what stands under the key now; None if nothing does or nobody may know."""
        from botocore.exceptions import ClientError

        with self._errors():
            try:
                etag: str = self._client.head_object(**self._where).get("ETag") or ""
            except ClientError as error:
                if refusal_of_response(error.response).status in (403, 404):
                    return None
                raise
            return etag

    def _exists(self) -> BuildError:
        return BuildError(f"{self._url}: exists already; choose another name or allow overwriting")

    def _abort(self) -> None:
        """Take away what was uploaded. What fails here is logged: the caller has an exception to raise."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)  # a part that arrives after the abort would stay
        upload, self._upload = self._upload, None
        if upload is None:
            return
        try:
            with self._errors():
                self._client.abort_multipart_upload(**self._where, UploadId=upload)
        except LazymemError as error:
            logger.warning(
                "%s: an upload was begun and could not be aborted, so its parts stay (%s); remove them with "
                "`aws s3api abort-multipart-upload --bucket %s --key %s --upload-id %s`",
                self._url, clean(str(error)), self._where["Bucket"], self._where["Key"], clean(upload),
            )  # fmt: skip

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._session.errors(self._url, self._where["Bucket"], self._where["Key"]):
                yield
        except LazymemError as error:
            raise build_error(error) from None

    def __repr__(self) -> str:
        return f"S3Upload({self._url!r})"


class _PartFile(io.RawIOBase):
    """Gathers what is written into parts."""

    def __init__(self, upload: S3Upload) -> None:
        self._upload = upload
        self._position = 0
        self._number = 1
        self._part = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Buffer, /) -> int:
        """All of it, always. Blocks while too many parts are on their way."""
        view = memoryview(data).cast("B")
        begin = 0
        while begin < len(view):
            size = part_size(self._number)
            end = min(len(view), begin + size - len(self._part))
            self._part += view[begin:end]
            begin = end
            if len(self._part) == size:
                self._number += 1
                self._upload.send(self.take())
        self._position += len(view)
        return len(view)

    def take(self) -> bytearray:
        """What was gathered; it is the caller's now."""
        part, self._part = self._part, bytearray()
        return part
