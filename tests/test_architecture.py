# SPDX-License-Identifier: Apache-2.0
"""Imports go down only (lazymem/DESIGN.md, *The house*), and the C leaves do not know one another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lazymem

ROOT = Path(lazymem.__file__).parent
# Lower layers first; a module may import from its own part and from any part below it that is listed.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "options": {"errors"},
    "dtypes": {"errors"},
    "_native": set(),
    "store": {"errors"},
    "containers": {"store", "errors", "dtypes"},
    "format": {"store", "errors", "dtypes", "options", "_native"},
    "catalog": {"format", "containers", "store", "errors", "dtypes", "_native"},
    "region": {"catalog", "store", "errors", "options", "_native"},
    "snapshot": {"region", "catalog", "format", "containers", "store", "errors", "options"},
    "builder": {"format", "containers", "store", "errors", "options", "dtypes"},
    "verifier": {"format", "containers", "store", "errors", "options", "_native"},
    "extractor": {"format", "containers", "store", "errors", "options", "dtypes"},
}
# What stands above all of them may import any of them; nothing below may import these.
TOP = {"cli", "demo", "doctor", "summary", "__main__", "__init__"}


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


def c_includes(name: str) -> set[str]:
    return set(re.findall(r'^#include "(\w+\.h)"', (ROOT / "_native" / name).read_text("utf-8"), re.M))


def test_c_leaves_do_not_know_one_another() -> None:
    for leaf in ("uffd", "codec", "planes", "table", "queue"):
        allowed = {f"{leaf}.h", "lazymem.h", "sys.h"}
        assert (
            c_includes(f"{leaf}.c") | c_includes(f"{leaf}.h" if leaf != "planes" else "planes.c") <= allowed
        )


def test_c_core_never_knows_python() -> None:
    sources = [p for p in (ROOT / "_native").glob("*.[ch]") if p.name != "_core.c"]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text("utf-8")
        assert "Python.h" not in text
        assert not re.search(r"\b(malloc|calloc|realloc|strdup|printf|fprintf)\(", text), path.name
