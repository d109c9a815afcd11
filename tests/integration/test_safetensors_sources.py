# SPDX-License-Identifier: Apache-2.0
"""What lazymem.safetensors opens beside one local file; that it is lazy, and shares memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lazymem
from lazymem.safetensors import SafetensorError, safe_open
from lazymem.safetensors.torch import load_file, load_model

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

SQUARE = torch.arange(64 * 1024, dtype=torch.float32).reshape(256, 256)
TENSORS = {
    **{f"layer.{i}.weight": SQUARE * (i + 1) for i in range(8)},
    "bf16": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "f8": torch.ones(5, dtype=torch.float8_e4m3fn),
    "f4": torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 5),
}


def _check(loaded: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        if tensor.numel():
            raw = (
                tensor.reshape(-1).view(torch.uint8)
                if tensor.element_size() > 1
                else tensor.view(torch.uint8)
            )
            mine = loaded[name]
            assert torch.equal(
                raw, mine.reshape(-1).view(torch.uint8) if mine.element_size() > 1 else mine.view(torch.uint8)
            )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "made by": "a test"})
    return path


@pytest.fixture(scope="module")
def snapshot(weights: Path) -> Path:
    path = weights.with_suffix(".lzm")
    lazymem.build(weights, path, chunk_size=64 << 10)
    return path


LAZY = """
import sys, torch
from lazymem.safetensors import safe_open
with safe_open(sys.argv[1], "pt", **eval(sys.argv[2])) as file:
    stats = file.snapshot.stats
    before = stats().chunks_populated
    tensors = file.get_tensors()
    part = file.get_slice("layer.3.weight")
    assert stats().chunks_populated == before, "getting tensors reads nothing"
    assert part[5, 7].item() == tensors["layer.3.weight"][5, 7].item() == 4 * (5 * 256 + 7)
    assert stats().chunks_populated - before <= 2, stats()
    tensors["layer.3.weight"][5, 7] = -1
    assert part[5, 7].item() == -1
del file, part
assert tensors["layer.2.weight"][0, 1].item() == 3, "the tensors keep the memory"
print(sum(float(t.float().sum()) for n, t in tensors.items() if n.startswith("layer")))
"""


def _sum_with_one_changed() -> float:
    return sum(float(t.sum()) for n, t in TENSORS.items() if n.startswith("layer")) - (4 * (5 * 256 + 7)) - 1


def test_snapshot_gives_the_same_tensors_lazily(snapshot: Path) -> None:
    assert float(check_child(LAZY, snapshot, "{}")) == pytest.approx(_sum_with_one_changed())


def test_pread_reads_only_what_is_touched(weights: Path) -> None:
    out = check_child(LAZY, weights, "{'backend': 'pread'}")
    assert float(out) == pytest.approx(_sum_with_one_changed())


def test_snapshot_has_the_files_own_metadata_and_words(weights: Path, snapshot: Path) -> None:
    with safe_open(weights, "np") as file, safe_open(snapshot, "np") as built:
        assert built.metadata() == file.metadata() == {"format": "pt", "made by": "a test"}
        assert built.keys() == file.keys()
        assert built.offset_keys() == file.offset_keys()
        for name in file.offset_keys():
            assert built.get_slice(name).get_dtype() == file.get_slice(name).get_dtype()
            assert built.get_slice(name).get_shape() == file.get_slice(name).get_shape()


def test_all_tensors_of_a_snapshot_are_the_files(snapshot: Path) -> None:
    script = """
        import sys, torch
        from lazymem.safetensors.torch import load_file
        for path in sys.argv[1:]:
            tensors = load_file(path)
            print([(n, str(t.dtype), tuple(t.shape)) for n, t in sorted(tensors.items())],
                  [(t.view(torch.uint8) if t.dim() else t).sum().item() for n, t in sorted(tensors.items())])
    """
    first, second = check_child(script, snapshot, snapshot.with_suffix(".safetensors")).splitlines()
    assert first == second


def test_local_file_gives_all_its_tensors(weights: Path) -> None:
    _check(load_file(weights))


def test_folder_and_index_of_shards_are_one_model(tmp_path: Path) -> None:
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: TENSORS[name] for name in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    _check(load_file(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    places = {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names}
    import json

    index.write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": places}))
    _check(load_file(index))
    with safe_open(index, "pt") as file:
        assert file.metadata() == {"total_size": "7"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SafetensorError, match=r"model-00002-of-00002\.safetensors"):
        load_file(index)


def test_s3_serves_file_and_snapshot(weights: Path, snapshot: Path, s3: Bucket) -> None:
    lazymem.copy(str(weights), s3.url("m/model.safetensors"))
    lazymem.copy(str(snapshot), s3.url("m/model.lzm"))
    for name in ("model.safetensors", "model.lzm"):
        out = check_child(LAZY, s3.url(f"m/{name}"), "{}")
        assert float(out) == pytest.approx(_sum_with_one_changed())
    with pytest.raises(FileNotFoundError):
        safe_open(s3.url("m/none.safetensors"), "pt")


@pytest.mark.needs_mapping
def test_two_processes_share_the_page_cache(weights: Path) -> None:
    script = """
        import sys
        from lazymem.safetensors.torch import load_file
        tensors = load_file(sys.argv[1])
        total = sum(float(t.sum()) for n, t in tensors.items() if n.startswith("layer"))
        private = shared = 0
        mapped = False
        for line in open("/proc/self/smaps"):
            if "-" in line.split(" ")[0]:
                mapped = line.rstrip().endswith(sys.argv[1])
            elif mapped and line.startswith("Anonymous:"):
                private += int(line.split()[1])
            elif mapped and line.startswith("Rss:"):
                shared += int(line.split()[1])
        print(private, shared)
    """
    private, resident = map(int, check_child(script, weights).split())
    assert private == 0, "no page of the file was copied"
    assert resident >= 8 * 256, "all of them are the page cache's"


def test_numpy_arrays_are_writable_private_and_not_copied(weights: Path) -> None:
    with safe_open(weights, "np") as file:
        array, part = file.get_tensor("layer.0.weight"), file.get_slice("layer.0.weight")[2:4]
        assert file.get_tensor("bf16").dtype.name == "bfloat16"
        assert file.get_tensor("f8").dtype.name == "float8_e4m3fn"
    assert array.flags.writeable
    assert np.shares_memory(array, part)
    array[2, 0] = -5
    assert part[0, 0] == -5
    with safe_open(weights, "np") as file:
        assert file.get_tensor("layer.0.weight")[2, 0] == 512


def test_meta_device_reads_nothing(weights: Path) -> None:
    tensors = load_file(weights, device="meta")
    assert all(tensor.is_meta for tensor in tensors.values())
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in TENSORS.items()
    }
    with safe_open(weights, "pt", "meta") as file:
        assert file.get_slice("layer.0.weight")[1:3].shape == (2, 256)


def test_reading_needs_no_safetensors_package(weights: Path) -> None:
    script = """
        import sys
        sys.modules["safetensors"] = None
        import torch
        from lazymem.safetensors import SafetensorError, safe_open, deserialize
        from lazymem.safetensors.torch import load, load_file, load_model
        from lazymem.safetensors.numpy import load as load_np
        data = open(sys.argv[1], "rb").read()
        assert load_file(sys.argv[1]).keys() == load(data).keys() == dict(deserialize(data)).keys()
        try:
            safe_open(sys.argv[1], "xx")
        except SafetensorError as error:
            print(error)
        model = torch.nn.Linear(2, 2)
        try:
            load_model(model, sys.argv[1])
        except RuntimeError as error:
            print("Missing" in str(error) and "Unexpected" in str(error))
        try:
            from lazymem.safetensors.torch import save_file
        except ImportError as error:
            print("pip install safetensors" in str(error))
        try:
            safe_open(sys.argv[1], "jax")
        except ImportError as error:
            print("pip install safetensors" in str(error))
    """
    assert check_child(script, weights).split("\n")[:-1] == [
        "framework xx is invalid",
        "True",
        "True",
        "True",
    ]


def test_without_torch_the_error_names_the_extra(weights: Path) -> None:
    script = """
        import sys
        sys.modules["torch"] = None
        from lazymem.safetensors import safe_open
        with safe_open(sys.argv[1], "np") as file:
            assert file.get_tensor("scalar") == 2.5
        try:
            safe_open(sys.argv[1], "pt").get_tensor("scalar")
        except ImportError as error:
            print(error)
    """
    assert "lazymem[torch]" in check_child(script, weights)


def test_newer_and_older_keywords_are_understood(weights: Path) -> None:
    for options in ({"mmap": False}, {"backend": "read_file"}, {"mmap": True}, {"something": "new"}):
        _check(load_file(weights, **options))
    with safe_open(weights, "np", mmap=False) as file:
        assert file.snapshot.backend != "map"
    for options, named in (
        ({"framework": "pt", "backend": "mmap"}, 'backend="pread"'),
        ({"framework": "np", "backend": "pread"}, 'framework="pt"'),
        ({"framework": "pt", "backend": "pread"}, "cuda"),
    ):
        with pytest.raises(SafetensorError, match=named):
            safe_open(weights, prefetch=True, **options)
    with (
        safe_open(weights, "pt", backend="pread") as file,
        pytest.raises(SafetensorError, match="prefetch=True"),
    ):
        file.tensor_stream()


def test_handle_pickles_by_reference(weights: Path) -> None:
    with safe_open(weights, "pt") as file:
        again = pickle.loads(pickle.dumps(file))
    assert torch.equal(again.get_tensor("layer.1.weight"), TENSORS["layer.1.weight"])
    with pytest.raises(SafetensorError, match="closed"):
        pickle.loads(pickle.dumps(file)).keys()


@pytest.mark.needs_lazy
def test_loading_a_model_reads_nothing(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from lazymem.safetensors import opening
        import lazymem.safetensors.handle as handle
        from lazymem.safetensors.torch import load_model
        opened = []
        real = handle.open_weights
        handle.open_weights = lambda *a: opened.append(real(*a)) or opened[-1]
        with torch.device(sys.argv[2]):
            model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)])
        parameters = list(model.parameters())
        assert load_model(model, sys.argv[1], backend="pread") == (set(), [])
        assert all(a is b for a, b in zip(parameters, model.parameters()))
        print(opened[0].stats().chunks_populated)
        model[0](torch.ones(1, 512)).sum().backward()
        print(opened[0].stats().chunks_populated, opened[0].chunk_count)
    """
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for device in ("cpu", "meta"):
        before, after, total = map(int, check_child(script, tmp_path / "model.safetensors", device).split())
        assert before == 0
        assert 0 < after < total


def test_model_of_a_snapshot_trains(snapshot: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(8))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    load_model(model, snapshot, strict=False)
    model.layer[0](torch.ones(1, 256)).sum().backward()
    optimizer.step()
    assert torch.equal(model.layer[0].weight, TENSORS["layer.0.weight"] - 0.5)
    assert torch.equal(load_file(snapshot)["layer.0.weight"], TENSORS["layer.0.weight"])
