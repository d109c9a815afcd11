# SPDX-License-Identifier: Apache-2.0
"""`load_model` into models of all kinds of ties: the same values, the same names, the same errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model

from .comparing import OURS, THEIRS, Package, Raised, both

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(6, 6)
        self.b = torch.nn.Linear(6, 6)


class Tied(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b = self.a


class TiedWeight(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class TiedByMemory(Pair):
    """Two parameters that are not one object."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight.data = self.a.weight.data


class Copied(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b = copy.deepcopy(self.a)


class Transposed(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight = torch.nn.Parameter(torch.zeros(6, 6).T)


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6)
        self.register_buffer("kept", torch.rand(3))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.nothing = torch.nn.Linear(6, 6, bias=False)


class Hooked(Pair):
    """Finds its weights under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state["a.weight"] = state["a.weight"].T


class Half(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class Frozen(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight.requires_grad_(False)


class Bigger(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(7, 6)


class Scaled(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))


MODELS: list[Callable[[], torch.nn.Module]] = [
    Pair, Tied, TiedWeight, TiedByMemory, Copied, Transposed, Normed, Hooked, Half, Frozen, Bigger, Scaled,
]  # fmt: skip


def _state(model: torch.nn.Module) -> dict[str, Any]:
    return {name: (tensor, tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("into", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("saved", MODELS, ids=lambda kind: kind.__name__)
def test_model_is_loaded_alike(saved: Any, into: Any, strict: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    save_model(saved(), str(path))
    torch.manual_seed(2)
    start = into()
    models = {package: copy.deepcopy(start) for package in (THEIRS, OURS)}
    parameters = {package: list(model.parameters()) for package, model in models.items()}

    def load(package: Package) -> Any:
        missing, unexpected = package.load_model(models[package], path, strict)
        return sorted(missing), sorted(unexpected), type(missing), type(unexpected)

    found = both(load)
    if isinstance(found, Raised):
        both(load, messages=True)
    both(lambda package: _state(models[package]))
    for package, model in models.items():
        assert all(a is b for a, b in zip(parameters[package], model.parameters(), strict=True))
    # Ties are what they were: what one changes the other shows.
    for model in models.values():
        with torch.no_grad():
            next(model.parameters()).add_(1)
    both(lambda package: _state(models[package]))


@pytest.mark.parametrize("kind", [Pair, Tied, TiedWeight, Normed], ids=lambda kind: kind.__name__)
def test_meta_model_becomes_the_saved_one(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    source = kind()
    save_model(source, str(path))
    with torch.device("meta"):
        model = kind()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert OURS.load_model(model, path) == (set(), [])
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
    if kind is not Pair and kind is not Normed:
        assert model.b.weight is model.a.weight


def test_both_names_of_a_tied_tensor_in_the_file_count_alike(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(Pair(), str(path))
    torch.manual_seed(3)
    start = Tied()
    models = {package: copy.deepcopy(start) for package in (THEIRS, OURS)}
    both(lambda package: package.load_model(models[package], path), messages=True)
    both(lambda package: _state(models[package]))


def test_optimizers_go_on_with_the_parameters(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(Pair(), str(path))

    def train(package: Package) -> Any:
        torch.manual_seed(4)
        model = Pair()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            model.b(model.a(torch.ones(2, 6))).sum().backward()
            optimizer.step()
            package.load_model(model, path)
            model.b(model.a(torch.ones(2, 6))).sum().backward()
            optimizer.step()
        return _state(model)

    both(train)


def test_scalars_saved_as_lists_of_one_are_taken_alike(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**Pair().state_dict(), "scale": torch.tensor([2.0])}, path)
    models = {package: Scaled() for package in (THEIRS, OURS)}
    both(lambda package: package.load_model(models[package], path))
    assert models[OURS].scale.item() == models[THEIRS].scale.item() == 2
