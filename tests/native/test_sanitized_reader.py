# SPDX-License-Identifier: Apache-2.0
"""The reader's hostile files and the damaged chunks again, with the C core under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .programs import NATIVE, SANITIZERS, core_objects, load_build

ROOT = Path(__file__).parents[2]
SUITES = ["tests/unit/test_format_index.py", "tests/faults/test_faults_damage.py"]


def runtime(name: str) -> str:
    return subprocess.run(
        ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_hostile_files_under_address_sanitizer(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build = load_build()
    package = tmp_path / "lazymem"
    shutil.copytree(NATIVE.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_core.c"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    native = package / "_native"
    build.emit(native / "_core.c")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = [native / "_core.c", *core_objects(tmp_path_factory, "address")]
    flags = [*build.FLAGS, *build.WRAPPER_FLAGS, "-g", "-shared", "-fPIC", *SANITIZERS["address"]]
    include = f"-I{sysconfig.get_path('include')}"
    target = str(native / f"_core{suffix}")
    subprocess.run(["cc", *flags, include, *sources, "-o", target, "-ldl", "-lm"], check=True)
    libasan = runtime("libasan.so")
    if not os.path.isabs(libasan):
        pytest.skip("the compiler has no shared ASan runtime")
    env = {
        **os.environ,
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=0:handle_sigbus=0",
        "PYTHONPATH": str(tmp_path),
    }
    check = "import lazymem._native as n; assert n.__file__.startswith('" + str(tmp_path) + "')"
    for command in (["-c", check], ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SUITES]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "AddressSanitizer" not in done.stderr + done.stdout
