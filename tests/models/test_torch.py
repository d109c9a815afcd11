# SPDX-License-Identifier: Apache-2.0
"""lazymem.torch: tensors that share a region, models that show them, devices that get them streamed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

import lazymem  # noqa: E402
import lazymem.torch  # noqa: E402
from lazymem.torch.streaming import PIECE, stream  # noqa: E402

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip


def of_every_dtype() -> dict[str, Any]:
    tensors = {}
    for dtype in DTYPES:
        raw = torch.arange(480, dtype=torch.uint8).remainder(2 if dtype == torch.bool else 251)
        tensors[str(dtype).removeprefix("torch.")] = raw.view(dtype).reshape(-1, 5)
    return {**tensors, "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same(found: Any, wanted: Any) -> None:
    assert (found.dtype, found.shape, bits(found)) == (wanted.dtype, wanted.shape, bits(wanted))


@pytest.fixture(params=["safetensors", "lzm", "pt"])
def everything(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "pt":
        torch.save(of_every_dtype(), tmp_path / "all.pt")
        return tmp_path / "all.pt"
    save_file(of_every_dtype(), tmp_path / "all.safetensors")
    if request.param == "lzm":
        lazymem.build(tmp_path / "all.safetensors", tmp_path / "all.lzm", chunk_size=64 << 10)
    return tmp_path / f"all.{request.param}"


def test_load_file_gives_every_dtype_bit_for_bit(everything: Path) -> None:
    found = lazymem.torch.load_file(everything)
    assert found.keys() == of_every_dtype().keys()
    for name, tensor in of_every_dtype().items():
        assert_same(found[name], tensor)


def test_writes_stay_here(everything: Path) -> None:
    before = everything.read_bytes()
    first, second = lazymem.torch.load_file(everything), lazymem.torch.load_file(everything)
    first["float32"].mul_(0)
    assert not first["float32"].any()
    assert_same(second["float32"], of_every_dtype()["float32"])
    assert everything.read_bytes() == before


def test_tensors_keep_the_memory_and_share_it(everything: Path) -> None:
    tensors = lazymem.torch.open(everything)
    one, again = tensors["int64"], tensors["int64"]
    with pytest.raises(BufferError):
        tensors.close()
    del tensors
    assert one.data_ptr() == again.data_ptr()
    assert one.untyped_storage().nbytes() == one.numel() * 8
    assert_same(one, of_every_dtype()["int64"])


def test_mapping_is_a_state_dict_and_pickles_by_reference(tmp_path: Path) -> None:
    module = torch.nn.Linear(30, 40)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    lazymem.build(tmp_path / "m.safetensors", tmp_path / "m.lzm")
    with lazymem.torch.open(tmp_path / "m.lzm") as tensors:
        assert list(tensors) == list(tensors.snapshot)
        assert "weight" in tensors
        assert len(tensors) == 2
        other = torch.nn.Linear(30, 40)
        other.load_state_dict(tensors)
        again = pickle.loads(pickle.dumps(tensors))
    assert_same(other.weight.detach(), module.weight.detach())
    assert_same(again["bias"], module.bias.detach())


@pytest.mark.needs_lazy
def test_looking_up_reads_nothing(tmp_path: Path) -> None:
    save_file({"x": torch.randn(100_000)}, tmp_path / "m.safetensors")
    lazymem.build(tmp_path / "m.safetensors", tmp_path / "m.lzm", chunk_size=64 << 10)
    tensors = lazymem.torch.open(tmp_path / "m.lzm", readahead=0)
    tensor = tensors["x"]
    assert tensors.snapshot.stats().chunks_populated == 0
    tensor[50_000].item()
    assert tensors.snapshot.stats().chunks_populated == 1


@pytest.mark.needs_lazy
def test_dtype_is_converted_chunk_by_chunk(tmp_path: Path) -> None:
    weights = torch.randn(300_000).bfloat16()
    save_file({"x": weights, "n": torch.arange(9)}, tmp_path / "m.safetensors")
    lazymem.build(tmp_path / "m.safetensors", tmp_path / "m.lzm", chunk_size=64 << 10)
    for source in ("m.safetensors", "m.lzm"):
        tensors = lazymem.torch.open(tmp_path / source, dtype=torch.float32, readahead=0, chunk_size=64 << 10)
        assert tensors["x"][40_000].item() == weights[40_000].float().item()
        assert tensors.snapshot.stats().chunks_populated == 1
        assert_same(tensors["x"], weights.float())
        assert_same(tensors["n"], torch.arange(9))


def test_bad_options_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(lazymem.OptionError, match=r"torch\.bfloat16"):
        lazymem.torch.load_file(tmp_path / "m.safetensors", dtype="no such thing")
    with pytest.raises(lazymem.OptionError, match="float16, bfloat16"):
        lazymem.torch.load_file(tmp_path / "m.safetensors", dtype=torch.int8)
    with pytest.raises(lazymem.OptionError, match="mode 'c'"):
        lazymem.torch.load_file(tmp_path / "m.safetensors", mode="r")


# ---- models ----


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(self.norm(x))


IDS = torch.arange(8)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(1)
    net = Net()
    net(IDS)  # the norm's buffers are no longer as they began
    return net.eval()


@pytest.fixture(params=["safetensors", "lzm"])
def saved(request: pytest.FixtureRequest, net: Any, tmp_path: Path) -> Path:
    from safetensors.torch import save_model

    save_model(net, tmp_path / "net.safetensors")
    if request.param == "lzm":
        lazymem.build(tmp_path / "net.safetensors", tmp_path / "net.lzm")
    return tmp_path / f"net.{request.param}"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_model_puts_tensors_into_the_models_own_parameters(net: Any, saved: Path, device: str) -> None:
    with torch.device(device):
        model = Net().eval()
    parameters = dict(model.named_parameters())
    assert lazymem.torch.load_model(model, saved) == (set(), [])
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(IDS), net(IDS))
    assert_same(model.norm.running_mean, net.norm.running_mean)


def test_loaded_model_trains_and_the_file_stays(net: Any, saved: Path) -> None:
    before = saved.read_bytes()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lazymem.torch.load_model(model, saved)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).pow(2).sum().backward()
        optimizer.step()
    assert not torch.equal(model.eval()(IDS), net(IDS))
    assert model.head.weight is model.embed.weight
    assert saved.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_keeps_its_dtype_or_gets_the_one_asked_for(net: Any, saved: Path, dtype: Any) -> None:
    for options in ({}, {"dtype": dtype}):
        model = Net().eval() if options else Net().eval().to(dtype)
        lazymem.torch.load_model(model, saved, **options)
        for (name, wanted), (_, found) in zip(net.named_parameters(), model.named_parameters(), strict=True):
            assert_same(found.detach(), wanted.detach().to(dtype))
            assert found.requires_grad, name
        assert model.head.weight is model.embed.weight
        assert model.norm.num_batches_tracked.dtype == torch.int64


def test_load_model_names_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(2, 2)
            del self.norm

    with pytest.raises(
        RuntimeError, match=r'Missing key.*"more\.bias", "more\.weight"[\s\S]*Unexpected key.*norm'
    ):
        lazymem.torch.load_model(Other(), saved)
    missing, unexpected = lazymem.torch.load_model(Other(), saved, strict=False)
    assert missing == {"more.bias", "more.weight"}
    assert sorted(unexpected)[0] == "norm.bias"
    model = Net()
    model.layers[1] = torch.nn.Linear(16, 17)
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.1\.weight"):
        lazymem.torch.load_model(model, saved)


class WithTable(torch.nn.Module):  # type: ignore[misc]
    """A buffer that is not saved, and a layer that the file lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0) / 3, persistent=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_changing_the_dtype_converts_what_is_not_replaced(tmp_path: Path, dtype: Any) -> None:
    save_file({"linear.weight": torch.full((4, 4), 1.5)}, tmp_path / "m.safetensors")
    model = WithTable()
    wanted = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    missing, _ = lazymem.torch.load_model(model, tmp_path / "m.safetensors", strict=False, dtype=dtype)
    assert missing == {"linear.bias", "other.weight", "other.bias"}
    assert torch.equal(model.linear.weight, torch.full((4, 4), 1.5, dtype=dtype))
    for name in missing:
        assert_same(model.state_dict()[name], wanted[name])
    assert_same(model.table, (torch.arange(4.0) / 3).to(dtype))


def test_model_is_untouched_where_there_is_nothing_to_load(tmp_path: Path) -> None:
    model = WithTable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lazymem.SnapshotNotFound):
        lazymem.torch.load_model(model, tmp_path / "none.lzm", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name])
    with pytest.raises(lazymem.OptionError, match="meta"):
        lazymem.torch.load_model(model, tmp_path / "none.lzm", device="meta")


class Overriding(torch.nn.Linear):  # type: ignore[misc]
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("hooked", ["override", "pre-hook", "dtype", "channels last"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_that_cannot_simply_be_shown_tensors_are_loaded_too(
    tmp_path: Path, hooked: str, device: str
) -> None:
    def make() -> Any:
        layer = Overriding(4, 4) if hooked == "override" else torch.nn.Linear(4, 4)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), layer)
        if hooked == "channels last":
            model.to(memory_format=torch.channels_last)
        if hooked == "pre-hook":
            layer.register_load_state_dict_pre_hook(lambda *args: None)
        if hooked == "dtype":
            model.register_buffer("steps", torch.zeros(3, dtype=torch.int32))
        return model

    saved = make()
    state = {name: tensor.contiguous() for name, tensor in saved.state_dict().items()}
    if hooked == "dtype":
        state["steps"] = torch.arange(3)  # int64
    save_file(state, tmp_path / "m.safetensors")
    with torch.device(device):
        model = make()
    parameters = list(model.parameters())
    assert lazymem.torch.load_model(model, tmp_path / "m.safetensors") == (set(), [])
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for (name, found), wanted in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert found.dtype == wanted.dtype
        assert found.stride() == wanted.stride(), name
        assert torch.equal(found, state[name].to(wanted.dtype))


@pytest.mark.needs_lazy
def test_a_hook_does_not_make_loading_eager(tmp_path: Path) -> None:
    big = torch.nn.Linear(1000, 1000)
    save_file(big.state_dict(), tmp_path / "m.safetensors")
    lazymem.build(tmp_path / "m.safetensors", tmp_path / "m.lzm", chunk_size=64 << 10)
    model = torch.nn.Linear(1000, 1000)
    model.register_load_state_dict_pre_hook(lambda *args: None)
    tensors = lazymem.torch.open(tmp_path / "m.lzm")
    from lazymem.torch.modules import assign_state

    assign_state(model, tensors)
    assert tensors.snapshot.stats().chunks_populated == 0
    assert torch.equal(model.weight, big.weight)


def test_arrays_that_are_no_tensors_are_unexpected_names(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 4)
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    lazymem.build({**arrays, "labels": np.array([b"cat", b"dog"])}, tmp_path / "m.lzm")
    other = torch.nn.Linear(3, 4)
    assert lazymem.torch.load_model(other, tmp_path / "m.lzm", strict=False) == (set(), ["labels"])
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(lazymem.UnsupportedDtype, match=r"m\.lzm: array 'labels': torch .* has no dtype"):
        lazymem.torch.load_file(tmp_path / "m.lzm")


def test_background_goes_on_populating_and_tells(net: Any, tmp_path: Path) -> None:
    big = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    save_file(big.state_dict(), tmp_path / "big.safetensors")
    lazymem.build(tmp_path / "big.safetensors", tmp_path / "big.lzm", chunk_size=64 << 10)
    told: list[tuple[int, int]] = []
    done = threading.Event()

    def tell(there: int, total: int) -> None:
        told.append((there, total))
        if there == total:
            done.set()

    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    lazymem.torch.load_model(model, tmp_path / "big.lzm", background=True, progress=tell)
    assert done.wait(60)
    assert told == sorted(told)
    assert torch.equal(model(torch.ones(1, 256)), big(torch.ones(1, 256)))


@pytest.mark.needs_lazy
def test_order_of_the_model_is_the_order_of_requests(s3: Bucket, proxy: HostileProxy, tmp_path: Path) -> None:
    """By name layer 10 would come before layer 2."""
    layers = {f"layers.{i}.weight": torch.randn(32, 512) for i in range(12)}  # 64 KiB each
    save_file(layers | {"embed.weight": torch.ones(32, 512), "lm_head.weight": torch.ones(32, 512)},
              tmp_path / "m.safetensors")  # fmt: skip
    s3.put("m.safetensors", (tmp_path / "m.safetensors").read_bytes())
    s3.through(proxy)
    options = {"concurrency": 1, "coalesce_size": 64 << 10, "hedge": False}
    snap = lazymem.open(s3.url("m.safetensors"), chunk_size=64 << 10, storage_options=options)
    before = len(proxy.requests())
    snap.prefetch(wait=True, order="model")
    starts = [int(request.headers["range"].removeprefix("bytes=").split("-")[0])
              for request in proxy.requests()[before:]]  # fmt: skip
    first_chunks = []
    for name in ["embed.weight", *(f"layers.{i}.weight" for i in range(12)), "lm_head.weight"]:
        info = snap.info(name)
        for chunk in range(info.offset >> 16, (info.offset + info.nbytes - 1 >> 16) + 1):
            if chunk not in first_chunks:
                first_chunks.append(chunk)
    assert [start >> 16 for start in starts] == first_chunks


# ---- devices ----


def big_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    tensors = {
        "a": torch.randn(PIECE // 4 + 12_345),
        "b": torch.randn(1000, 1000).bfloat16(),
        "c": torch.ones(3),
    }
    tensors["t"] = torch.randn(300, 200)
    save_file(tensors, folder / "big.safetensors")
    return folder / "big.safetensors", tensors


@pytest.mark.parametrize("backend", ["auto", "uffd-user", "sigsegv", "eager"])
@pytest.mark.parametrize("kind", ["safetensors", "lzm"])
def test_stream_gives_right_bytes_and_memory_back(tmp_path: Path, kind: str, backend: str) -> None:
    """The CPU stands in for a device: the same code, pinned memory and events apart."""
    path, tensors = big_file(tmp_path)
    if kind == "lzm":
        lazymem.build(path, tmp_path / "big.lzm", chunk_size=1 << 20)
        path = tmp_path / "big.lzm"
    told: list[tuple[int, int]] = []
    with lazymem.open(path, backend=backend) as snapshot:
        found = stream(snapshot, torch.device("cpu"), lambda done, total: told.append((done, total)))
        left = 0 if snapshot.backend in ("map", "eager") else snapshot.chunk_states().count(2)
    assert list(found) == list(snapshot_names(path))
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert left <= 2  # a chunk that was not passed, and one that was on its way
    assert told[-1] == (sum(t.nbytes for t in tensors.values()),) * 2


def snapshot_names(path: Path) -> list[str]:
    with lazymem.open(path) as snapshot:
        return list(snapshot)


def test_stream_keeps_strides_and_ties(tmp_path: Path) -> None:
    weight = torch.randn(40, 30)
    state = {"w": weight, "t": weight.t(), "f": torch.randn(8, 9).t(), "n": weight[3:5]}
    torch.save(state, tmp_path / "m.pt")
    with lazymem.open(tmp_path / "m.pt") as snapshot:
        found = stream(snapshot, torch.device("cpu"))
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_stream_refuses_strides_of_no_whole_elements_before_it_reads(tmp_path: Path) -> None:
    records = np.zeros(1000, [("a", "<f4"), ("b", "u1")])
    lazymem.build({"raw": records.view(np.uint8), "a": records["a"]}, tmp_path / "m.lzm")
    with lazymem.open(tmp_path / "m.lzm", backend="uffd-user") as snapshot:
        assert snapshot.info("a").strides == (5,)
        with pytest.raises(lazymem.OptionError, match=r"array 'a'.*cannot step by \(5,\) bytes"):
            stream(snapshot, torch.device("cpu"))
        assert snapshot.stats().chunks_populated == 0


def test_load_file_to_meta_reads_nothing(tmp_path: Path) -> None:
    path, tensors = big_file(tmp_path)
    found = lazymem.torch.load_file(path, "meta")
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    assert all(tensor.is_meta for tensor in found.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_load_file_to_cuda_gives_right_bytes(tmp_path: Path) -> None:
    path, tensors = big_file(tmp_path)
    for name, tensor in lazymem.torch.load_file(path, "cuda").items():
        assert tensor.is_cuda
        assert_same(tensor.cpu(), tensors[name])


def test_damage_is_raised_while_streaming(tmp_path: Path) -> None:
    path, _ = big_file(tmp_path)
    lazymem.build(path, tmp_path / "big.lzm")
    raw = bytearray((tmp_path / "big.lzm").read_bytes())
    raw[5_000_000] ^= 1
    (tmp_path / "big.lzm").write_bytes(raw)
    with pytest.raises(lazymem.ChunkCorrupt, match="'a'"), lazymem.open(tmp_path / "big.lzm") as snapshot:
        stream(snapshot, torch.device("cpu"))


@pytest.mark.needs_lazy
def test_evicted_arrays_are_read_again(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8)
    lazymem.build({"x": array, "y": array + 1}, tmp_path / "x.lzm", chunk_size=64 << 10)
    with lazymem.open(tmp_path / "x.lzm", mode="c", readahead=0) as snap:
        snap.prefetch(wait=True)
        snap["x"][0] += 1
        snap.evict("x")
        assert snap.chunk_states().count(2) == 16
        assert np.array_equal(snap["x"], array)
        assert snap.stats().chunks_populated == 32 + 16
        with pytest.raises(lazymem.ArrayNotFound):
            snap.evict("z")


def test_without_torch_the_extra_is_named() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport lazymem.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lazymem[torch]'" in done.stderr.splitlines()[-1]
