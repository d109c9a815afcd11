# SPDX-License-Identifier: Apache-2.0
"""Snapshots whose small files are made to harm whoever writes them into a folder, or parses them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import lazymem  # noqa: E402
import lazymem.transformers  # noqa: E402
from lazymem.builder import _copy  # noqa: E402
from lazymem.builder.containers import ContainerSource  # noqa: E402
from lazymem.containers.base import Directory  # noqa: E402
from lazymem.containers.folder import MAX_CARRIED, MAX_CARRIED_BYTES  # noqa: E402
from lazymem.errors import FormatError  # noqa: E402
from lazymem.format.writer import SnapshotWriter  # noqa: E402
from lazymem.opener import LocationOpener  # noqa: E402
from lazymem.options import BuildOptions, StoreOptions  # noqa: E402
from lazymem.recognizer import recognize  # noqa: E402

from .families import llama, save  # noqa: E402


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return save(llama(layers=1), tmp_path / "model", torch.float32)


def hostile(model: Path, files: dict[str, bytes]) -> Path:
    """A snapshot of the model that carries these files, too, whatever they are called."""
    path = model.parent / "hostile.lzm"
    found = recognize(str(model), LocationOpener(StoreOptions()), whole=True)
    assert isinstance(found, Directory)
    source = ContainerSource(replace(found, extra_files=files))
    with open(path, "wb") as file, SnapshotWriter(file, BuildOptions("zstd"), created_by="test") as writer:
        offsets, metadata = _copy(source, writer, None)
        origin, extents = source.origin(offsets)
        writer.finish(metadata={}, array_metadata=metadata, origin=origin, extents=extents)
    source.close()
    return path


def assert_refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        lazymem.transformers.from_pretrained(path, **options)
    assert caught.value.url == str(path)
    assert os.listdir(path.parent / "tmp") == []


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors/x.json",
        "config.json/y",
        "x" * 300,
        "a/" + "x" * 300 + "/b",
        "/".join(["deep"] * 3000),
        "/".join(["d"] * 20),
    ],
    ids=lambda name: name[:30],
)
def test_names_that_cannot_be_files_are_refused(model: Path, name: str) -> None:
    path = hostile(model, {name: b"{}"})
    assert_refused(path, r"carries a file '" + name[:50])
    assert_refused(path, r"carries a file '" + name[:50], model_class=hf.AutoModel)


def test_a_file_in_a_folders_place_is_refused(model: Path) -> None:
    path = hostile(model, {"z/y": b"1", "z": b"2"})
    assert_refused(path, "carries a file 'z'")
    with pytest.raises(FormatError, match="'z'"), lazymem.transformers.local_files(path):
        pass
    assert os.listdir(path.parent / "tmp") == []


def test_more_files_than_a_build_takes_are_refused(model: Path) -> None:
    assert_refused(hostile(model, {f"{n}.json": b"{}" for n in range(MAX_CARRIED)}), r"carries \d+ files")


def test_more_bytes_than_a_build_takes_are_refused(model: Path) -> None:
    """Zeros take no room in the snapshot, but would on disk."""
    zeros = bytes(MAX_CARRIED_BYTES // 8 + 1)
    path = hostile(model, {f"{n}.json": zeros for n in range(8)})
    assert path.stat().st_size < 1 << 20
    assert_refused(path, rf"bytes or more .*limit is {MAX_CARRIED_BYTES} bytes")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("null", "NoneType instead of an object"),
        ("[1]", "list instead of an object"),
        ("7", "int instead of an object"),
        ("{", "is no JSON"),
        ("\xff", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"a":' * 100_000, "is no JSON"),
        ('{"a":' + "[" * 200 + "]" * 200 + "}", "nested more than"),
    ],
    ids=lambda text: text[:10],
)
@pytest.mark.parametrize("model_class", [None, "AutoModel"])
def test_configurations_that_are_none_are_refused(
    model: Path, config: str, says: str, model_class: str | None
) -> None:
    (model / "config.json").write_bytes(config.encode("latin-1"))
    lazymem.build(model, model.parent / "m.lzm")
    chosen = model_class and getattr(hf, model_class)
    assert_refused(model.parent / "m.lzm", f"config.json.* {says}", model_class=chosen)


@pytest.mark.parametrize(
    "named", ["AutoTokenizer", "LlamaConfig", "pipeline", "models", "__name__", "nothing"]
)
def test_only_models_are_taken_for_the_class(model: Path, named: str) -> None:
    config = (model / "config.json").read_text()
    assert "LlamaForCausalLM" in config
    (model / "config.json").write_text(config.replace("LlamaForCausalLM", named))
    assert type(lazymem.transformers.from_pretrained(model)) is hf.LlamaModel
