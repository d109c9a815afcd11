# SPDX-License-Identifier: Apache-2.0
"""`lazymem demo`: it shows what it says, notices wrong bytes, and leaves nothing."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem import demo
from lazymem.cli import run
from lazymem.errors import BuildError
from lazymem.options import MIB

from ..children import check_child, run_child

Capture = pytest.CaptureFixture[str]

DEMO = """
import sys, lazymem.cli
sys.exit(lazymem.cli.run(["demo", "--size", "32M", "--dir", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    text = check_child(DEMO, folder, env={"LAZYMEM_BACKEND": "auto", "PYTHONIOENCODING": "utf-8"})
    assert list(folder.iterdir()) == []
    return text


def test_demo_fits_80_columns_and_has_no_colours_in_a_pipe(shown: str) -> None:
    assert "\x1b" not in shown
    # The temporary folder's name is as long as it is.
    assert [line for line in shown.splitlines() if len(line) > 80 and "lazymem-demo-" not in line] == []


def test_demo_compares_all_bytes(shown: str) -> None:
    assert re.search(r"Yes: +[\d.]+ MiB compared, every bit as in model.safetensors", shown)


def test_demo_draws_more_and_more_resident_chunks(shown: str) -> None:
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) chunks in memory", shown)]
    assert len(counts) == 3
    total = counts[0][1]
    if "lets no touch be lazy" in shown:
        pytest.skip("no userfaultfd here")
    assert counts[0][0] == 0
    assert 0 < counts[1][0] < total / 2
    assert counts[2][0] == total
    maps = re.findall("(?:^ {13}[\u2588\u00b70]+\n)+", shown, re.M)
    assert [text.count("\N{FULL BLOCK}") for text in maps] == [have for have, _ in counts]


def test_demo_where_nothing_is_lazy_says_so(tmp_path: Path) -> None:
    text = check_child(DEMO, tmp_path, env={"LAZYMEM_BACKEND": "eager"})
    assert "lets no touch be lazy" in text
    assert "every bit as in" in text


def test_demo_draws_with_ascii_where_the_terminal_has_no_more(tmp_path: Path) -> None:
    text = check_child(DEMO, tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert re.search(r"^ {13}[#0]+$", text, re.M)
    assert text.isascii()


WRONG = """
import sys, numpy as np, lazymem.cli, lazymem.demo
build = lazymem.demo.build
def other(source, destination, **options):
    report = build(source, destination, **options)
    with open(source, "r+b") as file:     # one bit of the original, after it was built from
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    return report
lazymem.demo.build = other
sys.exit(lazymem.cli.run(["demo", "--size", "16M", "--dir", sys.argv[1]]))
"""


def test_demo_notices_one_wrong_bit(tmp_path: Path) -> None:
    done = run_child(WRONG, tmp_path)
    assert done.returncode == 1
    assert "NO: 1 tensor, not as in model.safetensors" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_demo_model_is_a_safetensors_file_that_others_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with demo.Demo(16 * MIB, str(tmp_path)) as made:
        result = made.make_model()
        with safetensors.safe_open(made.model, "numpy") as file:
            assert len(list(file.keys())) == result.tensors
            weight = file.get_tensor("lm_head.weight")
            assert not file.get_tensor("model.layers.0.self_attn.q_proj.bias").any()
        assert weight.dtype == np.float32
        assert 0.019 < weight.std() < 0.021
        # Random blocks are not used twice: zstd would find them.
        assert not np.array_equal(weight[:100], weight[4096:4196])
        snap = lazymem.open(made.model)
        bits = snap["model.embed_tokens.weight"].astype(np.float32)
        assert 0.019 < bits.std() < 0.021


def test_demo_without_room_names_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 1 << 40, 10 * MIB))
    assert run(["demo"]) == 3
    err = capsys.readouterr().err
    assert "(10 MiB)" in err
    assert "--dir" in err
    with pytest.raises(BuildError, match="MiB on disk"):
        demo.Demo(16 * MIB, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["1", "15M", "65G"])
def test_demo_of_an_impossible_size_is_exit_2(size: str, capsys: Capture) -> None:
    assert run(["demo", "--size", size]) == 2
    assert "the size is" in capsys.readouterr().err


def test_demo_in_a_folder_that_is_not_there_is_exit_3(tmp_path: Path, capsys: Capture) -> None:
    assert run(["demo", "--dir", str(tmp_path / "none")]) == 3
    assert "No such file" in capsys.readouterr().err
