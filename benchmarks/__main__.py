# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: all questions, or some, in one run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# Before numpy: a parent that forks must have one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lazymem.options import cpu_count

from . import (
    fault_profile,
    first_element,
    first_token,
    full_scan,
    memory,
    opening,
    pager,
    random_touch,
    remote,
    report,
    sparse,
    weights,
)
from .data import KINDS, SEED, Data
from .harness import Case, Outcome, run_cases
from .question import Settings

QUESTIONS: Final[dict[str, ModuleType]] = {
    "first_element": first_element,
    "full_scan": full_scan,
    "random_touch": random_touch,
    "sparse": sparse,
    "opening": opening,
    "memory": memory,
    "fault_profile": fault_profile,
    "pager": pager,
    "remote": remote,
    "weights": weights,
    "first_token": first_token,  # the last one: from then on this process holds torch
}
_TINY_MB: Final = 8
#: What most children would import, one by one. Not blosc2, which starts threads when it is imported.
_PEERS: Final = (
    "boto3",
    "botocore.config",
    "s3transfer.manager",
    "s3fs",
    "zarr",
    "zarr.storage",
    "obstore.store",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", multiple=True, type=click.Choice(list(QUESTIONS)), help="Question; may be repeated.")
@click.option(
    "--match", default="", help="Only cases whose name contains this, and what they are held against."
)
@click.option("--size-mb", default=256, type=click.IntRange(min=8), help="Size of the array, MiB.")
@click.option("--model-mb", default=1024, type=click.IntRange(min=8), help="Size of the model in S3, MiB.")
@click.option("--repeats", default=3, type=click.IntRange(min=1), help="Measurements of each case.")
@click.option("--tiny", is_flag=True, help=f"{_TINY_MB} MiB, one repeat: does it run?")
@click.option(
    "--out", default=Path("bench-results"), type=click.Path(path_type=Path), help="Folder for JSON and plots."
)
@click.option(
    "--data",
    "data_folder",
    type=click.Path(path_type=Path),
    help="Keep the prepared files here and use those that are there [default: a temporary folder].",
)
@click.option("--deadline", default=60.0, help="Seconds after which a measurement is killed.")
def main(
    only: tuple[str, ...],
    match: str,
    size_mb: int,
    model_mb: int,
    repeats: int,
    tiny: bool,
    out: Path,
    data_folder: Path | None,
    deadline: float,
) -> None:
    """Measure lazymem beside its peers and the physical bounds.

    Prints a table a question and writes results.json and a plot a question. Exit code 1 if a case
    failed, gave wrong bytes or ran past its deadline.
    """
    # A run that is told to end takes its children and its folder with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if tiny:
        size_mb, model_mb, repeats = _TINY_MB, _TINY_MB, 1
        _be_quick()
    console, started = Console(), time.monotonic()
    if not console.is_terminal:
        console.width = 200  # rich would cut the tables at 80
    threads, skipped = min(max(cpu_count(), 2), 8), list[str]()  # threads: what the engine takes
    answers: dict[str, list[Outcome]] = {}
    head: dict[str, Any] = {
        "machine": report.machine(),
        "options": {
            "size_mb": size_mb,
            "model_mb": model_mb,
            "repeats": repeats,
            "tiny": tiny,
            "threads": threads,
        },
        "skipped": skipped,
        "data": {"seed": SEED, **{name: kind.text for name, kind in KINDS.items()}},
    }
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if data_folder is None:
            data_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazymem-bench-")))
        folder = data_folder / f"{size_mb}m"
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(_progress(console))
        for name in only or QUESTIONS:
            question = QUESTIONS[name]
            task = progress.add_task(name, total=None, step="")
            data = Data(folder, size_mb << 20, partial(_say, progress, task))
            with ExitStack() as servers:
                settings = Settings(threads, tiny, model_mb, servers, skipped)
                cases = _matching(list(question.cases(data, settings)), match)
                progress.update(task, total=len(cases) * repeats)
                answers[name] = run_cases(cases, repeats, deadline, partial(_say, progress, task, advance=1))
                getattr(question, "conclude", lambda outcomes: None)(answers[name])
            progress.remove_task(task)
            report.show(console, question, answers[name])
            report.write_plot(out / f"{name}.png", question, answers[name])
            head["seconds"] = time.monotonic() - started
            report.write_json(out / "results.json", head, answers)
            report.write_markdown(out / "RESULTS.md", head, QUESTIONS, answers)
    for sentence in skipped:
        console.print(sentence, style="yellow", markup=False)
    console.print(f"{time.monotonic() - started:.0f} s; RESULTS.md, results.json and plots in {out}")
    sys.exit(any(outcome.error for outcomes in answers.values() for outcome in outcomes))


def _be_quick() -> None:
    """Spare the children of a tiny run, whose figures nobody looks at, what each would do again."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads wait by turning round and round
    for name in _PEERS:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def _matching(cases: list[Case], text: str) -> list[Case]:
    wanted = {case.name for case in cases if text in case.name}
    held_against = {other for case in cases if case.name in wanted for other in case.against.values()}
    return [case for case in cases if case.name in wanted | held_against]


def _say(progress: Progress, task: TaskID, text: str, advance: int = 0) -> None:
    progress.update(task, advance=advance, step=text)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
