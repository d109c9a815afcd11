# SPDX-License-Identifier: Apache-2.0
"""A few seconds of the fuzzer: its corpus, and changes of it. Longer, from a folder of one's own:

    fuzz_core new-corpus tests/native/corpus -max_total_time=1200 -detect_leaks=0

by libFuzzer where clang and its runtime are; else by fuzz_driver.c, which changes bytes without looking.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .programs import HERE, NATIVE, SANITIZERS, load_build

SECONDS = 5
CORPUS = HERE / "corpus"
INPUT = "#include <stddef.h>\nint LLVMFuzzerTestOneInput(const char *d, size_t n) { return d == 0 && n; }\n"


def clang(folder: Path) -> str | None:
    """A clang that can link libFuzzer."""
    probe = folder / "probe.c"
    probe.write_text(INPUT)
    for name in ("clang", *(f"clang-{version}" for version in range(22, 12, -1))):
        if shutil.which(name) is not None:
            command = [name, "-fsanitize=fuzzer", str(probe), "-o", str(folder / "probe")]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return name
    return None


def build(compiler: str, flags: tuple[str, ...], mains: list[str], folder: Path) -> Path:
    native = load_build()
    options = [*(flag for flag in native.FLAGS if flag != "-O2"), "-O1", "-g", *SANITIZERS["address"], *flags,
               f"-I{NATIVE}", f"-I{HERE}"]  # fmt: skip
    sources = [*(NATIVE / name for name in native.SOURCES), HERE / "fuzz_core.c", *(HERE / m for m in mains)]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *options, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "fuzz_core"
    subprocess.run([compiler, *options, *objects, "-o", str(program), "-ldl", "-lm"], check=True)
    return program


def run(program: Path, *arguments: object) -> str:
    # What a decoder holds lies in memory that LeakSanitizer does not look into.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=program.parent, capture_output=True, text=True, errors="replace", timeout=100, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


@pytest.mark.timeout(300)  # compiles the core once more
def test_fuzzed_input_harms_nothing(tmp_path: Path) -> None:
    compiler = clang(tmp_path)
    if compiler is not None:
        program = build(compiler, ("-fsanitize=fuzzer", "-Wno-unknown-pragmas"), [], tmp_path)
        (tmp_path / "new").mkdir()
        # What it takes for its own peak is that of the process that started it, in Linux's accounting.
        options = [f"-max_total_time={SECONDS}", "-seed=1", "-max_len=2048", "-detect_leaks=0",
                   "-rss_limit_mb=0", "-malloc_limit_mb=256"]  # fmt: skip
        assert "Done " in run(program, tmp_path / "new", CORPUS, *options)
    elif shutil.which("cc") is not None:
        program = build("cc", (), ["fuzz_driver.c"], tmp_path)
        assert run(program, CORPUS, SECONDS).startswith("ok: ")
    else:
        pytest.skip("there is no C compiler")
