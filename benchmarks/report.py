# SPDX-License-Identifier: Apache-2.0
"""Tables, the JSON file, the plots, and the description of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from lazymem import _native

from .harness import Outcome
from .mounts import squashfs_decompressors
from .question import Column

#: Of the JSON file; raise it when a field changes its meaning.
SCHEMA: Final = 1
_PACKAGES: Final = (
    "numpy", "zstandard", "lz4", "xxhash", "zarr", "numcodecs", "blosc2", "boto3", "s3fs", "obstore",
    "runai-model-streamer-s3", "torch", "transformers", "safetensors", "tensorizer", "zipnn",
)  # fmt: skip
_STYLES: Final = {"lazymem": "bold green", "peer": "", "bound": "dim"}


def _first_line(path: str, default: str = "") -> str:
    try:
        return Path(path).read_text().strip().splitlines()[0]
    except (OSError, IndexError):
        return default


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _commit() -> str:
    """The commit that is measured, with "+" where the tree differs from it; empty outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + "+" if commit and git("status", "--porcelain", "--", "..") else commit


def machine() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": _memory_mib(),
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "kernel": platform.release(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "squashfs_decompressors": squashfs_decompressors(),
        "python": platform.python_version(),
        "packages": versions,
        "userfaultfd": [
            {"way": way.name, "errno": way.errno, "operations": list(way.operations)}
            for way in _native.probe()
        ],
        "commit": _commit(),
        "load_at_start": list(os.getloadavg()),
    }


def _cell(outcome: Outcome, column: Column) -> str:
    value = outcome.median(column.metric)
    return "" if value is None else f"{value * column.scale:,.{column.digits}f}"


def _headings(columns: Sequence[Column]) -> list[str]:
    return ["case", "ms", "min", "max", *(column.title for column in columns)]


def _row(columns: Sequence[Column], outcome: Outcome) -> list[str]:
    if outcome.error is not None:
        return [outcome.case.name, "failed"]
    seconds = outcome.values("seconds")
    times = (outcome.median("seconds") or 0.0, min(seconds), max(seconds))
    cells = (_cell(outcome, column) for column in columns)
    return [outcome.case.name, *(f"{1e3 * value:.2f}" for value in times), *cells]


def table(title: str, columns: Sequence[Column], outcomes: Sequence[Outcome]) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, heading in enumerate(_headings(columns)):
        result.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for outcome in outcomes:
        style = "red" if outcome.error is not None else _STYLES[outcome.case.kind]
        result.add_row(*_row(columns, outcome), style=style)
    return result


def _sections(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """By their tables, in the order they come."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.case.section, []).append(outcome)
    return found


def _used(columns: Sequence[Column], outcomes: Sequence[Outcome]) -> list[Column]:
    """Without those that would be empty."""
    return [column for column in columns if any(outcome.values(column.metric) for outcome in outcomes)]


def show(console: Console, question: ModuleType, outcomes: Sequence[Outcome]) -> None:
    for section, members in _sections(outcomes).items():
        console.print(table(section or question.TITLE, _used(question.COLUMNS, members), members))
    for outcome in outcomes:
        if outcome.error is not None:
            console.print(f"{outcome.case.name}: {outcome.error}", style="red", markup=False)


def write_json(path: Path, head: Mapping[str, Any], answers: Mapping[str, Sequence[Outcome]]) -> None:
    questions = {name: [outcome.as_json() for outcome in outcomes] for name, outcomes in answers.items()}
    path.write_text(json.dumps({"schema": SCHEMA, **head, "questions": questions}, indent=1) + "\n")


def write_markdown(
    path: Path,
    head: Mapping[str, Any],
    questions: Mapping[str, ModuleType],
    answers: Mapping[str, Sequence[Outcome]],
) -> None:
    """All tables and plots of a run as one page, the machine first."""
    machine, options = head["machine"], head["options"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        "# Results",
        "",
        f"Commit {machine['commit']}; {options['size_mb']} MiB, {options['repeats']} repeats, "
        f"{options['threads']} engine threads, {head['seconds']:.0f} s in all, load at start "
        f"{machine['load_at_start'][0]:.1f}. {machine['cpu']}, {machine['cpus']} processors, "
        f"{machine['memory_mib']:,} MiB{', virtual' if machine['hypervisor'] else ''}; Linux "
        f"{machine['kernel']}, huge pages {machine['huge_pages']}, squashfs decompressors "
        f"{machine['squashfs_decompressors']}; Python {machine['python']}, {packages}.",
    ]
    for name, outcomes in answers.items():
        lines += ["", f"## {questions[name].TITLE}", "", f"![{name}]({name}.png)", ""]
        for section, members in _sections(outcomes).items():
            columns = _used(questions[name].COLUMNS, members)
            headings = _headings(columns)
            lines += ["", f"### {section}", ""] if section else []
            lines += ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
            for outcome in members:
                row = _row(columns, outcome)
                row[0] = f"**{row[0]}**" if outcome.case.kind == "lazymem" else row[0]
                lines.append("| " + " | ".join(row + [""] * (len(headings) - len(row))) + " |")
    lines += ["", *(f"- {sentence}" for sentence in head["skipped"])]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def write_plot(path: Path, question: ModuleType, outcomes: Sequence[Outcome]) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(question.TITLE)
    question.plot(figure, outcomes)
    figure.savefig(path, dpi=110)
