# SPDX-License-Identifier: Apache-2.0
"""Imports go down only (lazymem/DESIGN.md, *The house*), and the C leaves do not know one another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lazymem

from .children import check_child

ROOT = Path(lazymem.__file__).parent
# Lower layers first; a module may import from its own part and from any part below it that is listed.
# fmt: off
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "options": {"errors"},
    "dtypes": {"errors"},
    "views": set(),
    "_native": set(),
    "cache": {"errors", "options"},
    "store": {"errors", "options"},
    "fetcher": {"store", "cache", "errors", "options", "_native"},
    "opener": {"fetcher", "store", "errors", "options"},
    "containers": {"store", "errors", "dtypes", "views"},
    "format": {"store", "errors", "dtypes", "views", "options", "_native"},
    "recognizer": {"format", "containers", "store", "errors"},
    "catalog": {"format", "containers", "store", "errors", "dtypes", "views", "_native"},
    "carried": {"format", "containers", "store", "errors"},
    "order": set(),
    "progress": set(),
    "latency": set(),
    "exchange": set(),
    "composition": {"catalog", "format", "errors", "dtypes", "_native"},
    "memory": {"catalog", "fetcher", "store", "errors", "options", "latency", "_native"},
    "extents": set(),
    "populator": {"memory", "extents"},
    "explainer": {"memory", "extents", "errors", "_native"},
    "ways": {"_native"},
    "region": {"ways", "memory", "catalog", "fetcher", "store", "errors", "options", "_native"},
    "paging": {"catalog", "fetcher", "errors", "options", "_native"},
    "snapshot": {"_native", "paging", "order", "progress", "region", "memory", "composition", "catalog",
                 "carried", "recognizer", "opener", "format", "containers", "store", "errors", "options",
                 "views"},
    "destination": {"format", "opener", "store", "errors", "options"},
    "builder": {"recognizer", "destination", "opener", "format", "containers", "store", "errors", "options",
                "dtypes", "views"},
    "verifier": {"opener", "format", "containers", "store", "errors", "options", "_native"},
    "extractor": {"recognizer", "opener", "format", "containers", "store", "errors", "options", "dtypes",
                  "views"},
    "copier": {"destination", "opener", "format", "store", "errors", "options"},
    "torch": {"order", "progress", "snapshot", "composition", "catalog", "dtypes", "errors"},
    "safetensors": {"torch", "transformers", "snapshot", "catalog", "containers", "store", "options",
                    "errors", "exchange"},
    "transformers": {"torch", "order", "progress", "snapshot", "composition", "format", "containers",
                     "errors", "exchange"},
    "pager": {"paging", "snapshot", "region", "memory", "catalog", "fetcher", "store", "errors", "options",
              "_native"},
    "summary": {"recognizer", "catalog", "carried", "opener", "format", "containers", "store", "errors",
                "options"},
}
# fmt: on
# What stands above all of them may import any of them; nothing below may import these.
TOP = {"cli", "demo", "doctor", "__main__", "__init__"}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    package = ("lazymem", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names] if base == ["lazymem"] else [base]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "lazymem" and len(name) > 1}
    return found


def test_imports_go_down_only() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = part_of(path)
        if part in TOP or (path.name == "build.py" and part == "_native"):
            continue
        allowed = MAY_IMPORT[part] | {part}
        wrong += [f"{path.relative_to(ROOT)} -> {other}" for other in imported_parts(path) - allowed]
    assert not wrong


def test_every_part_is_listed() -> None:
    parts = {part_of(path) for path in ROOT.rglob("*.py")}
    assert parts <= MAY_IMPORT.keys() | TOP


def test_only_the_native_border_knows_cffi() -> None:
    pattern = re.compile(r"^\s*(import|from) (cffi|lazymem\._native\._core|\.+_native\._core)\b", re.M)
    users = [p for p in ROOT.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))]
    assert {part_of(path) for path in users} <= {"_native"}


def test_only_options_reads_the_environment() -> None:
    pattern = re.compile(r"\bos\.(environ|getenv)\b")
    users = {part_of(p) for p in ROOT.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))}
    assert users == {"options", "_native"}  # _native/build.py: a switch of the build


def imported_at_once(path: Path) -> set[str]:
    """First names of what importing the module imports: not inside functions, not for types only."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found


def test_clients_of_stores_are_imported_by_the_stores_where_a_url_needs_them() -> None:
    clients = {"boto3", "botocore", "s3transfer", "obstore", "fsspec", "s3fs", "urllib3", "requests"}
    for path in ROOT.rglob("*.py"):
        assert not imported_at_once(path) & clients, path
        if part_of(path) != "store":
            named = re.search(rf"^\s*(import|from) ({'|'.join(clients)})\b", path.read_text("utf-8"), re.M)
            assert not named, path


def test_the_fetcher_starts_without_numpy() -> None:
    for path in ROOT.rglob("*.py"):
        if part_of(path) in {"errors", "options", "store", "cache", "fetcher", "_native"}:
            assert not imported_at_once(path) & {"numpy", "ml_dtypes", "zstandard", "click", "rich"}, path


def test_import_leaves_the_work_on_whole_files_for_later() -> None:
    """By its own modules, and by what they bring along; and all of it is there when it is asked for."""
    check_child(
        """
        import sys
        import lazymem
        later = {"lazymem.builder", "lazymem.copier", "lazymem.extractor", "lazymem.verifier",
                 "lazymem.format.writer", "tempfile"}
        assert not later & sys.modules.keys(), later & sys.modules.keys()
        assert set(lazymem.__all__) <= set(dir(lazymem))
        from lazymem import *
        assert build is lazymem.build is sys.modules["lazymem.builder"].build
        assert all(callable(globals()[name]) for name in lazymem.__all__)
        assert not hasattr(lazymem, "no_such_name")
        """
    )


def c_includes(name: str) -> set[str]:
    return set(re.findall(r'^#include "(\w+\.h)"', (ROOT / "_native" / name).read_text("utf-8"), re.M))


def test_c_leaves_do_not_know_one_another() -> None:
    for leaf in (
        "uffd",
        "space",
        "trap",
        "codec",
        "planes",
        "cast",
        "table",
        "pieces",
        "queue",
        "arena",
        "source",
        "spawn",
    ):
        allowed = {f"{leaf}.h", "lazymem.h", "sys.h"}
        assert (
            c_includes(f"{leaf}.c") | c_includes(f"{leaf}.h" if leaf != "planes" else "planes.c") <= allowed
        )


def test_only_sys_and_spawn_call_the_operating_system() -> None:
    """test_native.py looks at what they link to, too."""
    calls = re.compile(
        r"(?<![\w.>])(mmap|munmap|mprotect|madvise|mremap|mincore|ioctl|open|close|p?read|p?write|syscall|fcntl"
        r"|epoll_\w+|eventfd|socketpair|recv|sendmsg|poll|clone|fork|execve|kill|pthread_create|sigaction)\("
    )
    for path in (ROOT / "_native").glob("*.c"):
        if path.name in {"sys.c", "sys_pager.c", "spawn.c", "_core.c"}:
            continue
        text = re.sub(r"/\*.*?\*/|\"(\\.|[^\"])*\"(?!\s*$)", "", path.read_text("utf-8"), flags=re.S)
        assert not calls.findall(text), path.name


def test_c_core_never_knows_python() -> None:
    sources = [p for p in (ROOT / "_native").glob("*.[ch]") if p.name != "_core.c"]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text("utf-8")
        assert "Python.h" not in text
        if path.name not in {"space.c", "pager.c", "sys_pager.c"}:  # whose faults are other processes'
            assert not re.search(r"\b(malloc|calloc|realloc|strdup|printf|fprintf)\(", text), path.name
