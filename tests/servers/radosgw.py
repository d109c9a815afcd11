# SPDX-License-Identifier: Apache-2.0
"""Ceph's S3 gateway, the real server that the tests talk to: one monitor, one OSD with its data in
memory, one gateway, all on loopback, on free ports, in a directory of their own. About a second to start.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from . import processes
from .install import which

MEMORY = 4 << 30  # a limit, not a reservation

# No authentication between the daemons, one copy of everything, no background work that the tests
# would have to wait for. tcp_nodelay: without it a single connection stalls 44 ms now and then.
CONFIGURATION = """\
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = 127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 1
mon_data_avail_crit = 0
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
ms_crc_data = false
debug_rgw = 0/0
debug_osd = 0/0
debug_mon = 0/0
debug_paxos = 0/0
debug_rocksdb = 0/0
debug_ms = 0/0
run_dir = {directory}
admin_socket = {directory}/$name.asok
pid_file = {directory}/$name.pid
log_file = {directory}/$name.log
mon_cluster_log_file = {directory}/cluster.log
crash_dir = {directory}
[mon.a]
mon_data = {directory}/mon
[osd]
osd_data = {directory}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory}
osd_memory_target = 939524096
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
osd_heartbeat_interval = 2
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_enable_lc_threads = false
rgw_enable_quota_threads = false
rgw_run_sync_thread = false
rgw_data_log_num_shards = 1
rgw_gc_max_objs = 1
rgw_gc_obj_min_wait = 10
rgw_gc_processor_period = 5
rgw_lc_max_objs = 1
rgw_override_bucket_index_max_shards = 0
"""


@dataclass(frozen=True)
class Credentials:
    access_key: str
    secret_key: str = field(repr=False)


class RadosGateway:
    """A running server; a context manager. `credentials` belong to its first user."""

    def __init__(self, directory: Path, *, memory: int = MEMORY) -> None:
        self._parent = directory
        self._directory = directory / "0"
        self._memory = memory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RadosGateway:
        attempts = 3  # another process may take a port between our choice and the server's bind
        for attempt in range(1, attempts + 1):
            self._directory = self._parent / str(attempt)
            try:
                self._start()
                self.credentials = self.new_user()
                break
            except (RuntimeError, subprocess.SubprocessError):
                self.stop()
                if attempt == attempts:
                    raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        processes.stop(self._processes)
        self._processes = []

    def new_user(self) -> Credentials:
        """Another user, who owns nothing yet. The secret has characters that want quoting."""
        user = f"u{uuid.uuid4().hex[:12]}"
        access_key = f"ACCESSKEY{secrets.token_hex(6).upper()}"
        secret_key = f"secret/{secrets.token_hex(12)}+{secrets.token_hex(4)}="
        self.admin("user", "create", f"--uid={user}", f"--display-name={user}",
                   f"--access-key={access_key}", f"--secret-key={secret_key}")  # fmt: skip
        return Credentials(access_key, secret_key)

    def change_secret(self, credentials: Credentials, secret_key: str) -> None:
        """From now on the server refuses requests that are signed with the former secret."""
        self.admin("key", "create", "--key-type=s3", f"--access-key={credentials.access_key}",
                   f"--secret-key={secret_key}", f"--uid={self.user_of(credentials)}")  # fmt: skip

    def admin(self, *arguments: str) -> str:
        """Run radosgw-admin; its standard output."""
        return self._run(
            "radosgw-admin", "--no-mon-config", "--admin-socket=", "-n", "client.rgw", *arguments
        )

    def _start(self) -> None:
        self._directory.mkdir(parents=True)
        mon_port, self.port = processes.free_port(), processes.free_port()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        (self._directory / "ceph.conf").write_text(
            CONFIGURATION.format(
                fsid=fsid,
                mon_port=mon_port,
                port=self.port,
                directory=self._directory,
                memory=self._memory,
            )
        )
        for name in ("mon", "osd"):
            (self._directory / name).mkdir()
        monmap = str(self._directory / "monmap")
        self._run(
            "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap
        )
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._serve("ceph-mon", "--no-mon-config", "-i", "a")
        processes.wait_until(lambda: processes.accepts(mon_port), self._processes, self._log)
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._run("ceph-osd", "--no-mon-config", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "--no-mon-config", "-i", "0")
        self._serve("radosgw", "--no-mon-config", "-n", "client.rgw")
        processes.wait_until(lambda: processes.accepts(self.port), self._processes, self._log)

    def user_of(self, credentials: Credentials) -> str:
        info = json.loads(self.admin("user", "info", f"--access-key={credentials.access_key}"))
        user: str = info["user_id"]
        return user

    @property
    def _log(self) -> Path:
        return self._directory / "output.log"

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [which(name) or name, "-c", str(self._directory / "ceph.conf"), *arguments]

    def _serve(self, name: str, *arguments: str) -> None:
        # In the foreground ("-f"): a daemon would have left this process's children.
        self._processes.append(processes.start(self._command(name, "-f", *arguments), self._log))

    def _run(self, name: str, *arguments: str) -> str:
        done = subprocess.run(
            self._command(name, *arguments),
            env={**os.environ, "CEPH_CONF": str(self._directory / "ceph.conf")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{name} {arguments[:2]} failed:\n{done.stderr[-2000:]}")
        return done.stdout
