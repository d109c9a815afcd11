# SPDX-License-Identifier: Apache-2.0
"""nginx over a directory: ranges by http and by https, with a certificate of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from . import processes
from .install import which

# One process in the foreground, nothing outside its directory. /plain/ ignores ranges; /bare/ has no
# ETag, so that only the date tells versions apart; /ask/ wants a header.
CONFIGURATION = """\
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/tmp;
    proxy_temp_path {directory}/tmp;
    fastcgi_temp_path {directory}/tmp;
    uwsgi_temp_path {directory}/tmp;
    scgi_temp_path {directory}/tmp;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {directory}/certificate.pem;
        ssl_certificate_key {directory}/key.pem;
        root {root};
        location /plain/ {{ alias {root}/; max_ranges 0; }}
        location /bare/ {{ alias {root}/; etag off; }}
        location /ask/ {{
            alias {root}/;
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
        }}
    }}
}}
"""


class Nginx:
    """A running server of the files in `root`; a context manager."""

    token = "bearer-token-of-the-tests"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.root = directory / "root"
        self.certificate = directory / "certificate.pem"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        """Trusted by who trusts `certificate`."""
        return f"https://localhost:{self.tls_port}"

    def put(self, name: str, data: bytes) -> None:
        """Publish a file, in the place of an older one at once."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self._directory / "new"
        new.write_bytes(data)
        new.replace(path)

    def __enter__(self) -> Nginx:
        self.root.mkdir()
        subprocess.run(
            [which("openssl") or "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-keyout", str(self._directory / "key.pem"), "-out", str(self.certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        for attempt in range(3):  # another process may take a port before nginx does
            self.port, self.tls_port = processes.free_port(), processes.free_port()
            try:
                self._start()
                break
            except RuntimeError:
                processes.stop([self._process])
                if attempt == 2:
                    raise
        return self

    def __exit__(self, *exc: object) -> None:
        processes.stop([self._process])

    def _start(self) -> None:
        configuration = self._directory / "nginx.conf"
        configuration.write_text(
            CONFIGURATION.format(
                directory=self._directory,
                root=self.root,
                port=self.port,
                tls_port=self.tls_port,
                token=self.token,
            )
        )
        log = self._directory / "output.log"
        self._process = processes.start(
            [which("nginx") or "nginx", "-c", str(configuration), "-p", str(self._directory)], log
        )
        processes.wait_until(lambda: processes.accepts(self.tls_port), [self._process], log)
