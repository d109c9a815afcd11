# SPDX-License-Identifier: Apache-2.0
"""The servers that other tests build on do what those rely on, and never outlive a test run."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..servers.nginx import Nginx
    from ..servers.radosgw import RadosGateway
    from ..servers.s3 import Bucket


def test_radosgw_compares_etags_and_serves_the_last_bytes(s3: Bucket) -> None:
    etag = s3.put("key", b"0123456789")
    ask = {"Bucket": s3.bucket, "Key": "key"}
    assert s3.client.get_object(**ask, Range="bytes=-3", IfMatch=etag)["Body"].read() == b"789"
    s3.put("key", b"abcdefghij")
    with pytest.raises(s3.client.exceptions.ClientError, match=r"PreconditionFailed|412"):
        s3.client.get_object(**ask, Range="bytes=-3", IfMatch=etag)


def test_radosgw_refuses_a_secret_that_was_changed(s3_server: RadosGateway, s3: Bucket) -> None:
    from ..servers.s3 import s3_client

    user = s3_server.new_user()
    client = s3_client(s3_server.endpoint, user)
    client.list_buckets()
    s3_server.change_secret(user, "another/secret+of=the/same+user")
    with pytest.raises(client.exceptions.ClientError, match="SignatureDoesNotMatch"):
        client.list_buckets()
    s3_server.change_secret(user, user.secret_key)
    client.list_buckets()
    client.close()


def test_nginx_serves_ranges_by_http_and_https(nginx: Nginx) -> None:
    nginx.put("some/file", b"0123456789")
    trusting = ssl.create_default_context(cafile=str(nginx.certificate))
    for endpoint, context in ((nginx.endpoint, None), (nginx.tls_endpoint, trusting)):
        request = urllib.request.Request(f"{endpoint}/some/file", headers={"Range": "bytes=2-4"})
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            assert (answer.status, answer.read()) == (206, b"234")
            assert answer.headers["ETag"].startswith('"')
        with urllib.request.urlopen(f"{endpoint}/bare/some/file", context=context, timeout=30) as answer:
            assert answer.headers["ETag"] is None
            assert answer.headers["Last-Modified"]
        request.full_url = f"{endpoint}/plain/some/file"
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            assert (answer.status, answer.read()) == (200, b"0123456789")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{nginx.endpoint}/ask/some/file", timeout=30)
    caught.value.close()
    assert caught.value.code == 401


def test_a_killed_test_run_leaves_no_server_behind(s3_server: RadosGateway, tmp_path: Path) -> None:
    code = """
    import os, signal, sys
    from pathlib import Path
    from tests.servers.radosgw import RadosGateway
    with RadosGateway(Path(sys.argv[1])) as server:
        print(*[process.pid for process in server._processes], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    from ..children import run_child

    done = run_child(code, tmp_path)
    assert done.returncode == -signal.SIGKILL
    pids = done.stdout.split()
    assert len(pids) == 3
    end = time.monotonic() + 30
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < end, running
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    """A zombie, whom nobody may be there to reap, runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_the_packages_a_user_is_told_and_root_fails(s3_server: RadosGateway) -> None:
    code = """
    import os, sys
    import pytest
    from tests.servers import install
    need = install.Need(packages=("lazymem-no-such-package",), commands=("lazymem-no-such-command",))
    os.geteuid = lambda: 1000
    install.install([need])  # does nothing
    try:
        install.demand(need)
    except pytest.skip.Exception as skipped:
        print(skipped)
    os.geteuid = lambda: 0
    try:
        install.demand(need)
    except RuntimeError:
        print("error")
    """
    out = subprocess.run(
        [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines())],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
        timeout=60,
    ).stdout
    assert out.splitlines() == [
        "lazymem-no-such-command not found: apt-get install lazymem-no-such-package",
        "error",
    ]
