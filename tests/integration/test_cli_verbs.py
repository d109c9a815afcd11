# SPDX-License-Identifier: Apache-2.0
"""What each verb prints, writes and returns."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem.cli import run
from lazymem.containers import safetensors
from lazymem.format.index import parse_index
from lazymem.summary import list_arrays, summarize

Arrays = dict[str, NDArray[np.generic]]
Capture = pytest.CaptureFixture[str]
VERBS = ["build", "ls", "info", "verify", "extract", "cat", "copy", "doctor", "demo"]
HOSTILE = "\x1b[31m[red]x[/red]\x07\u202e\nmore"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A .safetensors file: a weight, a bias of zeros that fills chunks, and metadata."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((256, 512)) * 0.02).astype(np.float32)
    bias = np.zeros(100_000, np.float32)
    header = safetensors.make_header(
        [("w", "F32", [256, 512], weight.nbytes), ("b", "F32", [100_000], bias.nbytes)], {"by": "a test"}
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + weight.tobytes() + bias.tobytes())
    return path


@pytest.fixture
def built(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.lzm"
    lazymem.build(model, path, chunk_size=64 * 1024, metadata={"run": "7"})
    return path


def damage(path: Path, chunk: int) -> None:
    """Flip a stored byte of a chunk."""
    data = bytearray(path.read_bytes())
    index = parse_index(str(path), bytes(data), lambda offset, length: b"", len(data))
    record = index.record_of(chunk)
    assert record is not None
    data[int(index.records["offset"][record]) + 5] ^= 1
    path.write_bytes(data)


# ---- build ----


def test_build_takes_every_option_and_is_silent_in_a_pipe(model: Path, capsys: Capture) -> None:
    out = model.with_suffix(".lzm")
    options = "--codec lz4 --level 9 --chunk-size 128K --planes --threads 2 --metadata a=1 --metadata b=x=y"
    assert run(["build", *options.split(), str(model), str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    summary = summarize(out)
    assert summary.chunks is not None
    assert summary.chunks.size == 128 * 1024
    assert summary.chunks.codecs.keys() <= {"lz4", "raw"}
    # w, whose last few bytes lie in a chunk of their own (format/layout.py, phase); the header is none
    assert summary.chunks.filters == {"planes4": 5}
    assert summary.metadata == {"by": "a test", "a": "1", "b": "x=y"}


def test_build_without_planes_has_none(model: Path) -> None:
    out = model.with_suffix(".lzm")
    assert run(["build", "--no-planes", str(model), str(out)]) == 0
    chunks = summarize(out).chunks
    assert chunks is not None
    assert chunks.filters == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("64K", 65536), ("1m", 1 << 20), ("2MiB", 2 << 20), ("128kb", 1 << 17)],
)
def test_build_reads_sizes_with_units(model: Path, text: str, size: int) -> None:
    out = model.with_suffix(".lzm")
    assert run(["build", "--chunk-size", text, str(model), str(out)]) == 0
    assert lazymem.open(out).chunk_size == size


@pytest.mark.parametrize(
    "options",
    [
        ["--chunk-size", "2X"],
        ["--chunk-size", "-64K"],
        ["--chunk-size", "65"],
        ["--chunk-size", "\u0662M"],
        ["--codec", "gzip"],
        ["--codec", "lz4", "--level", "99"],
        ["--metadata", "novalue"],
        ["--metadata", "=x"],
        ["--threads", "0"],
        ["--nonsense"],
    ],
)
def test_build_wrong_option_is_exit_2_and_one_sentence(
    model: Path, options: list[str], capsys: Capture
) -> None:
    out = model.with_suffix(".lzm")
    assert run(["build", *options, str(model), str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lazymem: ")
    assert err.count("\n") == 1
    assert not out.exists()


def test_build_no_overwrite_keeps_what_is_there(model: Path, capsys: Capture) -> None:
    out = model.with_suffix(".lzm")
    out.write_bytes(b"precious")
    assert run(["build", "--no-overwrite", str(model), str(out)]) == 3
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert run(["build", str(model), str(out)]) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert run(["build", "--overwrite", str(model), str(out)]) == 0
    assert run(["build", str(model), str(out)]) == 0
    assert len(lazymem.open(out)) == 2


def test_build_says_when_the_source_cannot_be_given_back(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.arange(10_000) % 77)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", buffer.getvalue())
    assert run(["build", str(path), str(tmp_path / "x.lzm")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lazymem: note: `lazymem extract` will not give the source back byte for byte")
    assert err.count("\n") == 1
    assert run(["build", "--quiet", str(path), str(tmp_path / "x.lzm")]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "cut", "added"),
    [
        ("cut.lzm", slice(0, 3), b""),
        ("empty.LZM", slice(0, 0), b""),
        ("half.bin", slice(0, 100), b""),  # its head is whole
        ("junk-before.bin", slice(0, None), b"junk"),  # its tail is whole
        ("both-ends.lzm", slice(4, -200), b"XXXX"),
    ],
)
def test_damaged_snapshot_is_never_raw_bytes(
    built: Path, tmp_path: Path, name: str, cut: slice, added: bytes, capsys: Capture
) -> None:
    path, out = str(tmp_path / name), str(tmp_path / "out")
    Path(path).write_bytes(added + built.read_bytes()[cut])
    for verb in (
        ["ls", path],
        ["info", path],
        ["cat", path, "data"],
        ["extract", path, out],
        ["build", path, out],
        ["verify", path],
    ):
        assert run(verb) == 3, verb
        shown, err = capsys.readouterr()
        assert shown == ""
        assert "damaged" in err
    assert not os.path.exists(out)
    with pytest.raises(lazymem.FormatError, match=name):
        lazymem.open(path)
    assert lazymem.open(path, as_format="raw")["data"].nbytes == os.path.getsize(path)


def test_snapshot_with_a_damaged_head_opens_and_verify_names_it(
    built: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "x.bin", tmp_path / "out.safetensors"
    path.write_bytes(b"XXXX" + built.read_bytes()[4:])
    assert list(lazymem.open(path)) == ["w", "b"]
    assert run(["extract", str(path), str(out)]) == 0
    assert out.read_bytes() == model.read_bytes()
    assert run(["verify", str(path)]) == 1
    assert "head magic" in capsys.readouterr().out


def test_build_several_sources_into_one(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "extra.npy", np.arange(10))
    assert run(["build", str(model), str(tmp_path / "extra.npy"), str(tmp_path / "all.lzm")]) == 0
    assert len(lazymem.open(tmp_path / "all.lzm")) == 3


# ---- ls ----


def test_ls_shows_dtype_shape_size_and_name(built: Path, capsys: Capture) -> None:
    assert run(["ls", str(built)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["float32", "[256,512]", "512", "KiB", "w"],
        ["float32", "[100000]", "390.6", "KiB", "b"],
    ]


def test_ls_long_shows_the_chunks(built: Path, capsys: Capture) -> None:
    assert run(["ls", "--long", str(built)]) == 0
    infos = {info.name: info for info in list_arrays(built)}
    out = capsys.readouterr().out
    for info in infos.values():
        assert info.first_chunk is not None
        assert info.chunks is not None
        assert f"chunks {info.first_chunk}-{info.first_chunk + info.chunks - 1}" in out
    spans = lazymem.open(built)
    assert infos["b"].first_chunk == spans.info("b").offset // spans.chunk_size


@pytest.mark.parametrize("kind", ["npy", "npz", "npz-compressed", "safetensors", "raw", "folder"])
def test_ls_and_info_read_every_container(tmp_path: Path, model: Path, kind: str, capsys: Capture) -> None:
    array = np.arange(1000.0)
    path = tmp_path / f"source.{kind[:3]}"
    if kind == "npy":
        np.save(path, array)
    elif kind == "npz":
        np.savez(path, a=array)
    elif kind == "npz-compressed":
        np.savez_compressed(path, a=array)
    elif kind == "safetensors":
        path = model
    elif kind == "raw":
        path.write_bytes(b"whatever")
    else:
        path = tmp_path / "folder"
        path.mkdir()
        model.rename(path / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(("w", "b"), "model-00001-of-00001.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(["ls", "--json", str(path)]) == 0
    arrays = json.loads(capsys.readouterr().out)
    assert run(["ls", "--long", str(path)]) == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert listed == [entry["name"] for entry in arrays] != []
    assert run(["info", "--json", str(path)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["arrays"] == len(arrays)
    assert info["array_bytes"] == sum(entry["nbytes"] for entry in arrays)
    assert info["chunks"] is None
    assert run(["info", str(path)]) == 0
    compressed = kind == "npz-compressed"
    how = "1 array compressed: `lazymem build` it first" if compressed else "read in place"
    assert f"{info['format']}, {how}" in capsys.readouterr().out
    assert info["compressed_arrays"] == compressed
    if compressed:
        assert arrays[0]["compression"] == "deflate"
        assert arrays[0]["stored_bytes"] < arrays[0]["nbytes"] == 8000


def test_ls_reads_only_the_index(built: Path, capsys: Capture) -> None:
    for chunk in range(4):
        damage(built, chunk)
    assert run(["ls", str(built)]) == 0
    assert run(["info", str(built)]) == 0
    assert capsys.readouterr().err == ""


def test_names_cannot_act_on_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "\x1b]0;title\x07[bold].lzm"
    lazymem.build({HOSTILE: np.arange(3)}, path, metadata={HOSTILE: HOSTILE})
    for verb in (["ls"], ["ls", "-l"], ["info"], ["verify"], ["info", "--json"], ["ls", "--json"]):
        assert run([*verb, str(path)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert not set(out) & {"\x1b", "\x07", "\u202e"}
        if verb == ["ls"]:
            assert out.rstrip("\n").endswith("\\x1b[31m[red]x[/red]\\x07\\u202e\\nmore")
            assert out.count("\n") == 1
    assert run(["cat", str(path), "\x1b[2J"]) == 3
    assert run(["info", str(path) + "\x1b[2J"]) == 3
    assert run(["\x1b[2J"]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())


def test_names_of_damaged_chunks_cannot_act_on_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.lzm"
    lazymem.build({HOSTILE: np.arange(100)}, path)
    damage(path, 0)
    assert run(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\x1b" not in out


def test_path_that_is_not_utf8_is_shown_escaped(tmp_path: Path, capsys: Capture) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.lzm")
    lazymem.build({"a": np.arange(3)}, path)
    assert run(["info", path]) == 0
    assert "\\udcff.lzm" in capsys.readouterr().out


# ---- info ----


def test_info_json_has_the_same_keys_for_everything(built: Path, model: Path, capsys: Capture) -> None:
    found = []
    for path in (built, model):
        assert run(["info", "--json", str(path)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].keys() == found[1].keys()
    snapshot = found[0]
    chunks = snapshot["chunks"]
    assert snapshot["format"] == "lzm"
    assert snapshot["file_bytes"] == built.stat().st_size
    assert snapshot["metadata"] == {"by": "a test", "run": "7"}
    assert snapshot["digest"] == lazymem.open(built).digest
    assert chunks["stored"] + chunks["zero"] == chunks["count"] == lazymem.open(built).chunk_count
    assert chunks["zero"] >= 5
    assert sum(chunks["codecs"].values()) == chunks["stored"]
    assert snapshot["container"] == {
        "format": "safetensors",
        "exact": True,
        "reason": None,
        "files": [
            {
                "name": "model.safetensors",
                "size": model.stat().st_size,
                "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            }
        ],
    }


def test_info_text_says_the_same(built: Path, model: Path, capsys: Capture) -> None:
    assert run(["info", str(built)]) == 0
    out = capsys.readouterr().out
    digest = lazymem.open(built).digest
    assert digest is not None
    for part in (
        digest,
        "run = 7",
        "byte for byte",
        hashlib.sha256(model.read_bytes()).hexdigest(),
        "2 arrays",
    ):
        assert part in out


# ---- verify ----


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_verify_fine_is_exit_0(built: Path, options: list[str], capsys: Capture) -> None:
    assert run(["verify", *options, str(built)]) == 0
    out, err = capsys.readouterr()
    assert "fine" in out
    assert err == ""
    assert run(["verify", "--quiet", str(built)]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [[], ["--quick"], ["--quiet"]])
def test_verify_lists_every_bad_chunk_and_is_exit_1(built: Path, options: list[str], capsys: Capture) -> None:
    bad = [list_arrays(built)[0].first_chunk or 0, (list_arrays(built)[0].first_chunk or 0) + 3]
    for chunk in bad:
        damage(built, chunk)
    assert run(["verify", *options, str(built)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED: 2 of" in out
    for chunk in bad:
        assert f"chunk {chunk}, " in out
    assert "holds w" in out


def test_verify_of_another_format_is_exit_3(model: Path, capsys: Capture) -> None:
    assert run(["verify", str(model)]) == 3
    assert "lazymem build" in capsys.readouterr().err


# ---- extract, cat ----


def test_extract_gives_back_the_original(built: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(["extract", str(built), str(tmp_path / "again.safetensors")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "again.safetensors").read_bytes() == model.read_bytes()
    assert run(["extract", str(built), str(tmp_path / "again.safetensors")]) == 3
    assert run(["extract", "--overwrite", str(built), str(tmp_path / "again.safetensors")]) == 0


@pytest.mark.parametrize("form", ["npz", "npy", "raw", "safetensors"])
def test_extract_writes_other_formats(built: Path, tmp_path: Path, form: str) -> None:
    weight = np.array(lazymem.open(built)["w"])
    target = tmp_path / f"out.{form}"
    assert run(["extract", "--format", form, str(built), str(target), "w"]) == 0
    if form == "raw":
        assert target.read_bytes() == weight.tobytes()
    else:
        snap = lazymem.open(target)
        assert np.array_equal(snap[next(iter(snap))], weight)


def test_extract_of_an_unknown_array_is_exit_3(built: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(["extract", str(built), str(tmp_path / "x.npz"), "nosuch"]) == 3
    assert "'nosuch'" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_cat_writes_the_bytes_and_nothing_else(
    built: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["cat", str(built), "w"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == lazymem.open(built)["w"].tobytes()
    assert err == b""


def test_cat_to_a_terminal_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    stream = io.TextIOWrapper(Terminal())
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(["cat", str(built), "w"]) == 2
    assert stream.buffer.tell() == 0


def test_cat_of_a_damaged_chunk_is_exit_3(built: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    damage(built, list_arrays(built)[0].first_chunk or 0)
    assert run(["cat", str(built), "w"]) == 3
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"is damaged" in err


# ---- copy ----


def test_copy_copies_and_refuses_like_build(built: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert run(["copy", str(built), str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    assert out.read_bytes() == built.read_bytes()
    assert run(["copy", str(built), str(out)]) == 0
    for flag in ("--no-overwrite", "--if-none-match"):
        assert run(["copy", flag, str(built), str(out)]) == 3
        assert "exists already" in capsys.readouterr().err
    out.write_bytes(b"precious")
    assert run(["copy", str(built), str(out)]) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert run(["copy", "--overwrite", str(built), str(out)]) == 0
    assert run(["verify", "--quiet", str(out)]) == 0


def test_copy_of_a_damaged_snapshot_is_exit_3(built: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    damage(built, list_arrays(built)[0].first_chunk or 0)
    assert run(["copy", str(built), str(out)]) == 3
    assert "is damaged" in capsys.readouterr().err
    assert not out.exists()
    assert run(["copy", "--no-verify", str(built), str(out)]) == 0
    assert out.read_bytes() == built.read_bytes()


# ---- options of stores ----


@pytest.mark.parametrize("verb", [["ls"], ["info"], ["verify"], ["cat"], ["extract"], ["build"], ["copy"]])
@pytest.mark.parametrize(
    "option",
    [
        "secret_access_key=hunter2",
        "aws_session_token=hunter2",
        "key=hunter2",
        "SECRET=hunter2",
        "headers={hunter2}",
        "password hunter2",
        "endpoint_url=http://me:hunter2@host",
    ],
)
def test_secrets_on_the_command_line_are_refused_and_not_repeated(
    built: Path, verb: list[str], option: str, capsys: Capture
) -> None:
    more = {"cat": ["w"], "extract": ["out"], "build": ["out"], "copy": ["out"]}.get(verb[0], [])
    assert run([*verb, "-o", option, str(built), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is, or holds, a secret" in err
    assert "profile=NAME" in err
    assert err.count("\n") == 1
    assert "hunter2" not in err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("nonsense=1", "storage option 'nonsense' is unknown; there are"),
        ("timeout=soon", "timeout is 'soon'; it must be a number"),
        ("concurrency=1.5", "concurrency is '1.5'; it must be a number"),
        ("concurrency=0", "concurrency is 0; it must be from 1"),
        ("hedge=maybe", "hedge is 'maybe'; it must be True or False"),
        ("region", "'region' is not KEY=VALUE"),
        ("=x", "'=x' is not KEY=VALUE"),
        ("endpoint_url=localhost:1", "must begin with http:// or https://"),
    ],
)
def test_wrong_storage_option_is_exit_2(built: Path, option: str, says: str, capsys: Capture) -> None:
    assert run(["ls", "-o", option, str(built)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_storage_options_reach_the_verb(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    seen: list[dict[str, object]] = []

    def spy(source: object, **options: object) -> list[object]:
        seen.append(options)
        return []

    monkeypatch.setattr("lazymem.summary.list_arrays", spy)
    options = "-o anonymous=true -o hedge=off -o timeout=2.5 -o concurrency=4 -o anon=True -o ca_bundle=no"
    more = "-o region=7 -o ca_bundle=/a@b"
    assert run(["ls", *options.split(), *more.split(), str(built)]) == 0
    assert seen.pop() == {
        "storage_options": {
            "anonymous": True, "hedge": False, "timeout": 2.5, "concurrency": 4, "anon": True,
            "ca_bundle": "/a@b", "region": "7",
        },
    }  # fmt: skip
    assert run(["ls", str(built)]) == 0
    assert seen.pop() == {"storage_options": {}}


@pytest.mark.parametrize(
    "args", [["ls", "URL"], ["copy", "URL", "x"], ["build", "URL", "x"], ["verify", "URL"]]
)
def test_unknown_scheme_is_one_sentence(tmp_path: Path, args: list[str], capsys: Capture) -> None:
    url = "ftp://me:hunter2@host/x.lzm?signature=hunter2"
    args = [{"URL": url, "x": str(tmp_path / "x")}.get(arg, arg) for arg in args]
    assert run(args) == 2
    err = capsys.readouterr().err
    assert "ftp" in err
    assert "hunter2" not in err
    assert err.count("\n") == 1


def test_extract_to_a_url_says_what_to_do(built: Path, capsys: Capture) -> None:
    assert run(["extract", str(built), "s3://bucket/x"]) == 2
    assert "lazymem copy" in capsys.readouterr().err


# ---- help and errors ----


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples(verb: str, capsys: Capture) -> None:
    assert run([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Examples:\n    lazymem {verb}" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_help_lists_verbs_and_exit_codes(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "3 ", "70 ", "130", "141"):
        assert f"\n    {code}" in out
    for verb in VERBS:
        assert f"\n  {verb}" in out
    assert "..." not in out.partition("Commands:")[2]  # click cuts what is too long
    assert max(len(line) for line in out.splitlines()) <= 80


def test_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["lazymem,", "version", lazymem.__version__]


@pytest.mark.parametrize("args", [[], ["nosuchverb"], ["ls"], ["build", "x"], ["cat", "x"]])
def test_wrong_usage_is_exit_2(args: list[str], capsys: Capture) -> None:
    assert run(args) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("verb", ["ls", "info", "verify"])
def test_missing_file_is_exit_3_and_one_sentence(verb: str, tmp_path: Path, capsys: Capture) -> None:
    assert run([verb, str(tmp_path / "none.lzm")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"lazymem: {tmp_path}/none.lzm: there is no such file; check the path\n"


def test_defect_shows_its_traceback_and_is_no_documented_code(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(source: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("lazymem.summary.list_arrays", broken)
    assert run(["ls", str(built)]) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "please report" in err
