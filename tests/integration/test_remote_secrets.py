# SPDX-License-Identifier: Apache-2.0
"""Keys, tokens and signatures: not in errors, logs, repr, pickles, nor in what `ps` shows."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..children import run_child
from ..servers.proxy import Fault

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

KEY = "model.lzm"
TOKEN = "the/session+token=of/the+tests"

# Everything that lazymem says, and all that says something about it, at its most talkative.
TALK = """
import json, logging, os, pickle, sys, traceback
from pathlib import Path
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
logging.getLogger("botocore").setLevel(logging.INFO)  # its DEBUG shows headers to who asks it for them
import lazymem
from lazymem.fetcher.client import RemoteBlob, fetcher_pid, fetcher_status
from lazymem.options import StoreOptions

url, given = os.environ["THE_URL"], json.loads(os.environ["THE_OPTIONS"])

def processes():
    for pid in (os.getpid(), fetcher_pid()):
        print(Path(f"/proc/{pid}/cmdline").read_bytes().replace(bytes(1), b" ").decode())

def tell(call):
    try:
        thing = call()
    except Exception as error:
        traceback.print_exc()
        for shown in (str(error), repr(error), repr(vars(error)), pickle.dumps(error, 0)):
            print(shown)
    else:
        print(repr(thing), str(thing))
        return thing

print(tell(lambda: StoreOptions.from_environment(given)))
print(tell(lambda: StoreOptions.from_environment(given).public()))
snap = tell(lambda: lazymem.open(url, storage_options=given))
processes()
if snap is not None:
    print("opened", flush=True)
    tell(lambda: pickle.dumps(snap, 0))
    tell(lambda: pickle.dumps(snap))
    handle = tell(lambda: snap.handle(next(iter(snap))))
    if handle is not None:
        print(vars(handle), pickle.dumps(handle, 0))
    tell(lambda: snap.prefetch("fortran", wait=True))
    tell(lambda: snap.read("scalar"))
    print(snap.stats())
print(fetcher_status())
processes()
tell(lambda: lazymem.open(url + ".other", storage_options=given))
tell(lambda: lazymem.verify(url, storage_options=given))
tell(lambda: lazymem.build({}, url + ".built", storage_options=given))
tell(lambda: lazymem.open(url, storage_options={**given, "no_such_option": 1}))
sys.stdout.flush()
if snap is not None:
    snap["fortran"].sum()
"""


@pytest.fixture
def url(s3: Bucket, proxy: HostileProxy, snapshot_path: Path) -> str:
    s3.put(KEY, snapshot_path.read_bytes())
    s3.through(proxy)
    return s3.url(KEY)


def signatures(proxy: HostileProxy) -> set[str]:
    """Of all requests that were sent so far."""
    found = set()
    for request in proxy.requests():
        found |= set(re.findall(r"Signature=([^,\s]+)", request.headers.get("authorization", "")))
        found |= {value for name, value in request.query.items() if name.endswith("Signature")}
    return found


def talk(url: str, options: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """Not by the command line: what stands there is not what is tested."""
    return run_child(TALK, env={"THE_URL": url, "THE_OPTIONS": json.dumps(options)})


def around(secret: str, told: str) -> str:
    """Where it stands, for the message of a test that fails."""
    at = told.find(secret)
    return told[max(0, at - 300) : at + len(secret) + 100]


#: In an error's text each of them is tempting.
CONDITIONS = {
    "nothing": None,
    "500": Fault(status=500),
    "403": Fault(status=403, code="SignatureDoesNotMatch"),
    "400": Fault(status=400, code="ExpiredToken"),
    "reset": Fault(reset=0),
    "garbage": Fault(garbage=b"no http at all\r\n\r\n"),
    "truncated": Fault(truncate=3),
}


@pytest.mark.parametrize(
    ("client", "condition", "source"),
    [
        *(("http", condition, "environment") for condition in CONDITIONS),
        *(("http", condition, "storage_options") for condition in ("nothing", "403")),
        *(
            (client, condition, "environment")
            for client in ("boto3", "obstore")
            for condition in ("500", "403")
        ),
    ],
)
def test_no_secret_is_ever_told(
    s3: Bucket,
    proxy: HostileProxy,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    condition: str,
    client: str,
    source: str,
) -> None:
    options: dict[str, object] = {"timeout": 0.5, "attempt_timeout": 0.3, "client": client}
    if source == "storage_options":
        options |= {"key": s3.credentials.access_key, "secret": s3.credentials.secret_key}
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fault = CONDITIONS[condition]
    if fault is not None:
        proxy.add(fault, skip=1)  # after it was opened
    done = talk(url, options)
    told = done.stdout + done.stderr
    assert url in told
    assert "opened" in told, told
    if fault is not None:
        assert "Traceback" in told, told
    seen = signatures(proxy)
    assert seen
    for secret in (s3.credentials.secret_key, s3.credentials.access_key, *seen):
        assert secret not in told, around(secret, told)


@pytest.mark.parametrize("client", ["http", "boto3", "obstore"])
def test_no_session_token_is_ever_told(
    s3: Bucket, proxy: HostileProxy, url: str, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    done = talk(url, {"timeout": 1, "client": client})
    told = done.stdout + done.stderr
    sent = proxy.requests()
    assert any(TOKEN in f"{request.headers} {request.query}" for request in sent)
    for secret in (TOKEN, s3.credentials.secret_key, s3.credentials.access_key, *signatures(proxy)):
        assert secret not in told, around(secret, told)


@pytest.mark.parametrize("condition", ["nothing", "500", "403", "garbage"])
def test_no_signature_of_a_presigned_url_is_ever_told(
    s3: Bucket, proxy: HostileProxy, url: str, condition: str
) -> None:
    from ..servers.s3 import s3_client

    client = s3_client(proxy.endpoint, s3.credentials)
    presigned = client.generate_presigned_url("get_object", {"Bucket": s3.bucket, "Key": KEY})
    client.close()
    plain, _, query = presigned.partition("?")
    fault = CONDITIONS[condition]
    if fault is not None:
        proxy.add(fault, skip=1)
    done = talk(presigned, {"timeout": 0.5})
    told = done.stdout + done.stderr
    assert plain in told
    assert "opened" in told, told
    assert "Traceback" in told, told  # a pickle of it is refused
    seen = signatures(proxy)
    assert seen
    for secret in (query, *seen):
        assert secret not in told, around(secret, told)


def test_command_line_tells_one_sentence_without_secrets(s3: Bucket, proxy: HostileProxy, url: str) -> None:
    proxy.add(Fault(status=403, code="SignatureDoesNotMatch"))
    code = """
    import subprocess, sys
    command = [sys.executable, "-m", "lazymem", "ls", sys.argv[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.returncode, done.stdout, done.stderr)
    """
    told = run_child(code, url).stdout
    assert told.startswith("3 "), told
    assert url in told
    for secret in (s3.credentials.secret_key, s3.credentials.access_key, *signatures(proxy)):
        assert secret not in told, around(secret, told)
