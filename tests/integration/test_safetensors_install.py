# SPDX-License-Identifier: Apache-2.0
"""`install()`: transformers and accelerate load through lazymem, to the same bits; all is put back."""

from __future__ import annotations

import functools
import pickle
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import lazymem
import lazymem.safetensors
from lazymem.safetensors import Installation, install, uninstall

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.s3 import Bucket


def _in_place() -> tuple[Any, ...]:
    return (
        safetensors.safe_open,
        safetensors.deserialize,
        safetensors.torch.load_file,
        safetensors.torch.load,
        safetensors.torch.load_model,
        safetensors.numpy.load_file,
        safetensors.numpy.load,
    )


# In a tuple: a name of this module that means an original would be replaced, too.
ORIGINALS = _in_place()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, path)
    return path


@pytest.fixture
def user() -> Any:
    """A module that was written by somebody else, and imported before."""
    module = types.ModuleType("somebody_elses")
    exec(
        "from safetensors import safe_open\nfrom safetensors.torch import load_file as load", module.__dict__
    )
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)
    sys.modules.pop("imported_meanwhile", None)


def test_install_replaces_and_uninstall_restores(path: Path, user: Any) -> None:
    before = dict(vars(user))
    with install() as installed:
        assert all(new is not old for new, old in zip(_in_place(), ORIGINALS, strict=True))
        assert issubclass(user.safe_open, lazymem.safetensors.safe_open)
        assert user.load is safetensors.torch.load_file
        with user.safe_open(path, "pt") as file:
            assert file.get_tensor("weight").sum() == 12
        assert user.load(path)["bias"].shape == (3,)
        assert installed.opened == (str(path), str(path))
        assert safetensors.torch.save_file is lazymem.safetensors.torch.save_file
    assert _in_place() == ORIGINALS
    assert dict(vars(user)) == before


def test_modules_imported_meanwhile_are_restored_too(path: Path, user: Any) -> None:
    with install():
        module = types.ModuleType("imported_meanwhile")
        code = """
            from safetensors import safe_open
            from safetensors.torch import load_model
            from lazymem.safetensors import safe_open as on_purpose
        """
        exec(textwrap.dedent(code), module.__dict__)
        sys.modules[module.__name__] = module
        assert issubclass(module.safe_open, lazymem.safetensors.safe_open)
    assert module.safe_open is ORIGINALS[0]
    assert module.load_model is ORIGINALS[4]
    assert module.on_purpose is lazymem.safetensors.safe_open


def test_snapshots_are_opened_where_files_were(path: Path) -> None:
    snapshot = path.with_suffix(".lzm")
    lazymem.build(path, snapshot)
    out = check_child(
        """
        import sys
        import lazymem.safetensors
        lazymem.safetensors.install()
        from safetensors.torch import load_file
        print(load_file(sys.argv[1])["weight"].sum().item())
        """,
        snapshot,
    )
    assert float(out) == 12


def test_nested_use_counts() -> None:
    outer = install()
    with install():
        pass
    assert _in_place() != ORIGINALS
    inner = install()
    outer.uninstall()
    outer.uninstall()
    assert _in_place() != ORIGINALS
    inner.uninstall()
    assert _in_place() == ORIGINALS
    uninstall()
    install()
    uninstall()
    assert _in_place() == ORIGINALS


def test_an_error_in_the_block_restores() -> None:
    def fail() -> None:
        with install():
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert _in_place() == ORIGINALS


def test_threads_may_install_at_once() -> None:
    start = threading.Barrier(8)
    seen: list[bool] = []

    def work() -> None:
        start.wait()
        for _ in range(20):
            with install():
                seen.append(safetensors.safe_open is not ORIGINALS[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen)
    assert _in_place() == ORIGINALS


@pytest.mark.parametrize("first", ["install", "load"])
def test_install_and_a_load_that_overlap_restore_all(first: str, tmp_path: Path) -> None:
    """Either ends first. While installed, other files than the load's own go to lazymem."""
    pytest.importorskip("transformers")
    from transformers import modeling_utils as theirs

    from lazymem.transformers.redirection import shown_as

    names: Any = theirs
    load = shown_as(str(tmp_path / "shown"), {"weight": torch.ones(1)})
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"bias": torch.ones(2)}, path)
    if first == "install":
        installed = install()
        with load:
            with names.safe_open(path, "pt") as file:
                assert isinstance(file, lazymem.safetensors.safe_open)
            installed.uninstall()
            with names.safe_open(path, "pt") as file:
                assert not isinstance(file, lazymem.safetensors.safe_open)
            with names.safe_open(str(tmp_path / "shown"), "pt") as file:
                assert file.keys() == ["weight"]
    else:
        with load:
            installed = install()
            with names.safe_open(path, "pt") as file:
                assert isinstance(file, lazymem.safetensors.safe_open)
            with names.safe_open(str(tmp_path / "shown"), "pt") as file:
                assert file.keys() == ["weight"]
        assert names.safe_open is safetensors.safe_open is not ORIGINALS[0]
        installed.uninstall()
    assert names.safe_open is ORIGINALS[0]


def test_threads_may_install_and_load_at_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import modeling_utils as theirs

    from lazymem.transformers.redirection import shown_as

    names: Any = theirs
    start = threading.Barrier(4)
    found: list[bool] = []

    def work(number: int) -> None:
        start.wait()
        for _ in range(10 if number < 2 else 200):
            if number < 2:
                with install():
                    found.append(safetensors.safe_open is not ORIGINALS[0])
            else:
                path = str(tmp_path / f"shown {number}")
                with shown_as(path, {}), names.safe_open(path, "pt") as file:
                    found.append(file.keys() == [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 420
    assert all(found)
    assert names.safe_open is ORIGINALS[0]
    assert _in_place() == ORIGINALS


UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    handle, functions = pickle.load(file)
print(float(handle.get_tensor("weight").sum()), type(handle).__mro__[1].__module__)
print(float(functions[0](sys.argv[2])["weight"].sum()), *[function.__name__ for function in functions])
assert "lazymem" not in __import__("safetensors").safe_open.__module__
"""


def test_handles_and_functions_pickle_for_other_processes(path: Path, tmp_path: Path) -> None:
    """A process where nothing is installed gets lazymem's, which take snapshots as they do here."""
    snapshot = path.with_suffix(".lzm")
    lazymem.build(path, snapshot)
    with install(), safetensors.safe_open(snapshot, "pt") as handle:
        functions = [*_in_place()[2:], safetensors.deserialize]
        data = pickle.dumps((handle, functions))
        again, same = pickle.loads(data)
        assert same == functions
        assert isinstance(again, safetensors.safe_open)
        assert pickle.loads(pickle.dumps(safetensors.safe_open)) is safetensors.safe_open
    # Taken away meanwhile, they are found as before.
    assert pickle.loads(data)[1] == functions
    (tmp_path / "pickled").write_bytes(data)
    lines = check_child(UNPICKLE, tmp_path / "pickled", snapshot).splitlines()
    assert lines == [
        "12.0 lazymem.safetensors.handle",
        "12.0 load_file load load_model load_file load deserialize",
    ]


def test_other_frameworks_go_to_the_package_while_installed(path: Path) -> None:
    pytest.importorskip("safetensors")
    with install(), safetensors.safe_open(path, "jax") as file:
        assert file.keys() == ["bias", "weight"]
        with pytest.raises(ModuleNotFoundError, match="jax"):
            file.get_tensor("bias")


def _bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )
    return BertModel(config)


def _llama(tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=500,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


MODELS = {
    "bert": _bert,
    "llama": functools.partial(_llama, False),
    "llama-tied": functools.partial(_llama, True),
}


@pytest.fixture(
    scope="module", params=[(model, shards) for model in MODELS for shards in (False, True)], ids=str
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type, Path]:
    pytest.importorskip("transformers")
    make: Callable[[], Any] = MODELS[request.param[0]]
    torch.manual_seed(1)
    model = make()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, **({"max_shard_size": "200KB"} if request.param[1] else {}))
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == request.param[1]
    return type(model), folder


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20).reshape(2, 10))[0]


def _same_files(installed: Installation, folder: Path) -> None:
    assert {Path(url) for url in installed.opened} == set(folder.glob("*.safetensors"))


# torch and its friends warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_transformers_loads_through_lazymem_to_the_same_bits(saved: tuple[Any, Path]) -> None:
    kind, folder = saved
    expected = kind.from_pretrained(folder, dtype="auto")
    with install() as installed:
        loaded = kind.from_pretrained(folder, dtype="auto")
    _same_files(installed, folder)
    assert torch.equal(_answer(loaded), _answer(expected))
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = kind.from_pretrained(folder, dtype="auto")
    assert torch.equal(_answer(again), _answer(expected))


@pytest.mark.parametrize("way", ["in_model", "dispatch"])
def test_accelerate_loads_through_lazymem_to_the_same_bits(saved: tuple[Any, Path], way: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    kind, folder = saved
    expected = kind.from_pretrained(folder, dtype="auto")

    def load() -> Any:
        with accelerate.init_empty_weights():
            model = kind(expected.config)
        model.tie_weights()
        if way == "in_model":
            accelerate.load_checkpoint_in_model(model, folder, device_map={"": "cpu"})
            return model
        return accelerate.load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})

    theirs = load()
    with install() as installed:
        ours = load()
    _same_files(installed, folder)
    assert torch.equal(_answer(ours), _answer(theirs))


# ---- accelerate, of what only lazymem opens ----


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 2)
        self.tied = torch.nn.Linear(6, 8, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x) + self.tied(x)))


@pytest.fixture
def net(tmp_path: Path) -> Any:
    torch.manual_seed(4)
    net = Net().eval()
    state = net.state_dict()
    del state["tied.weight"]
    safetensors.torch.save_file(state, tmp_path / "net.safetensors", metadata={"format": "pt"})
    lazymem.build(tmp_path / "net.safetensors", tmp_path / "net.lzm")
    return net


def _empty(kind: str) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if kind == "real":
        return Net().eval()
    with accelerate.init_empty_weights():
        net = Net().eval()
    net.tied.weight = net.first.weight
    return net


INPUT = torch.arange(18, dtype=torch.float32).reshape(3, 6)
MAPS = {
    "none": None,
    "cpu": {"": "cpu"},
    "modules": {"first": "cpu", "norm": "cpu", "last": "cpu", "tied": "cpu"},
    "disk": {"first": "cpu", "norm": "cpu", "last": "disk", "tied": "cpu"},
}


@pytest.mark.parametrize("kind", ["real", "meta"])
@pytest.mark.parametrize("devices", MAPS)
def test_accelerate_takes_snapshots_and_urls(
    net: Any, tmp_path: Path, devices: str, kind: str, s3: Bucket
) -> None:
    """The same answers as the module whose weights they are; and all its arguments by accelerate itself."""
    accelerate = pytest.importorskip("accelerate")
    for name in ("net.lzm", "net.safetensors"):
        s3.put(name, (tmp_path / name).read_bytes())
    sources = [tmp_path / "net.lzm", str(tmp_path / "net.lzm"), s3.url("net.lzm"), s3.url("net.safetensors")]
    expected = net(INPUT)
    with install():
        for number, source in enumerate(sources):
            if "disk" not in devices:
                model = _empty(kind)
                accelerate.load_checkpoint_in_model(model, source, device_map=MAPS[devices])
                assert torch.equal(model(INPUT), expected)
                assert model.tied.weight is model.first.weight
            model = accelerate.load_checkpoint_and_dispatch(
                _empty(kind), source, device_map=MAPS[devices], offload_folder=tmp_path / f"off {number}"
            )
            assert torch.equal(model(INPUT), expected)
    with pytest.raises(ValueError, match="checkpoint"):
        accelerate.load_checkpoint_in_model(_empty(kind), sources[2])


@pytest.mark.needs_lazy
def test_accelerate_reads_nothing_of_a_snapshot_before_it_is_touched(tmp_path: Path) -> None:
    """By the counters, with a device map and without one."""
    pytest.importorskip("accelerate")
    lazymem.build({"weight": torch.ones(512, 1024).numpy(), "bias": torch.ones(512).numpy()},
                  tmp_path / "model.lzm", chunk_size=64 << 10)  # fmt: skip
    code = """
import sys, torch, accelerate, lazymem, lazymem.safetensors
from lazymem import snapshot as snapshots
lazymem.safetensors.install()
found, first = [], snapshots.Snapshot.__init__
def init(self, *args, **kwargs):
    first(self, *args, **kwargs)
    found.append(self)
snapshots.Snapshot.__init__ = init
for device_map in (None, {"": "cpu"}):
    with accelerate.init_empty_weights():
        model = torch.nn.Linear(1024, 512)
    accelerate.load_checkpoint_in_model(model, sys.argv[1], device_map=device_map)
    snap = found.pop()
    assert not found
    before = snap.stats().chunks_populated
    total = model.weight.sum().item()
    print(before, snap.stats().chunks_populated >= 32, total)
"""
    assert check_child(code, tmp_path / "model.lzm") == "0 True 524288.0\n" * 2


def test_accelerates_arguments_hold_for_snapshots(net: Any, tmp_path: Path, caplog: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    source = tmp_path / "more.lzm"
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    lazymem.build({**tensors, "extra": tensors["last.bias"]}, source)
    with install():
        for device_map in (None, {"": "cpu"}):
            with pytest.raises((RuntimeError, ValueError), match="extra"):
                accelerate.load_checkpoint_in_model(
                    _empty("real"), source, device_map=device_map, strict=True
                )
            model = _empty("real")
            accelerate.load_checkpoint_in_model(model, source, device_map=device_map)
            assert torch.equal(model(INPUT), net(INPUT))
        accelerate.load_checkpoint_in_model(model, source, device_map={"": "cpu"}, dtype="bfloat16")
        assert model.last.weight.dtype == torch.bfloat16
        accelerate.load_checkpoint_in_model(model, source, {"": "cpu"}, None, torch.float32)
        assert torch.equal(model(INPUT), net(INPUT))
        with pytest.raises(lazymem.SnapshotNotFound):
            accelerate.load_checkpoint_in_model(model, tmp_path / "nowhere.lzm")
        found = accelerate.utils.modeling.load_state_dict(source, {"": "cpu", "last": "meta"})
        assert found["last.weight"].is_meta
        assert torch.equal(found["first.weight"], net.first.weight)
        assert found.keys() == {*tensors, "extra"}
        found = accelerate.utils.modeling.load_state_dict(source, {"": "disk"})
        assert found["first.weight"].device.type == "cpu"
    assert "extra" in caplog.text


def test_accelerates_functions_are_restored_and_pickle() -> None:
    accelerate = pytest.importorskip("accelerate")
    modeling = accelerate.utils.modeling
    before = accelerate.load_checkpoint_in_model, modeling.load_state_dict
    with install():
        assert accelerate.load_checkpoint_in_model is accelerate.big_modeling.load_checkpoint_in_model
        assert accelerate.load_checkpoint_in_model is not before[0]
        changed = pickle.loads(pickle.dumps(accelerate.load_checkpoint_in_model))
        assert changed is accelerate.load_checkpoint_in_model
    assert (accelerate.load_checkpoint_in_model, modeling.load_state_dict) == before
    assert accelerate.big_modeling.load_checkpoint_in_model is before[0]


def test_accelerate_imported_after_install_is_seen_to(net: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    code = """
import sys, torch, lazymem.safetensors
installed = lazymem.safetensors.install()
assert "accelerate" not in sys.modules
from accelerate import load_checkpoint_in_model
model = torch.nn.ModuleDict({"last": torch.nn.Linear(8, 2)})
load_checkpoint_in_model(model, sys.argv[1])
print(model["last"].bias.tolist())
installed.uninstall()
print(load_checkpoint_in_model.__module__)
"""
    out = check_child(code, tmp_path / "net.lzm")
    assert out.splitlines() == [str(net.last.bias.tolist()), "accelerate.utils.modeling"]
