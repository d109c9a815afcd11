# SPDX-License-Identifier: Apache-2.0
"""Tensors into a model's own parameters and buffers, by replacing what these show instead of copying.

torch's `load_state_dict` stays the judge of names, shapes and hooks. What can be replaced is replaced first
and then given to it as the very tensor that is in the model: copying a tensor to itself ends at once,
before any memory is touched. Everything else it copies and converts as ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

#: A module's _parameters or _buffers, and a name in it.
_Place = tuple[dict[str, Any], str]


def assign_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[set[str], list[str]]:
    """Load `state`; the names that it lacks, and those that the model does not need.

    Of names that are tied in the model one is enough: the others count as unexpected where they are given.
    Raises `RuntimeError` for shapes that differ, and for tied tensors of which none has all the memory.
    """
    ties = tied_names(model, state)
    if _is_hooked(model):
        result = _load_hooked(model, state)
    else:
        loaded = _assign(model, state)
        _allocate(model, state)
        result = model.load_state_dict(loaded, strict=False)
    missing, unexpected = set(result.missing_keys), list(result.unexpected_keys)
    for names in ties.values():
        for name in names:
            if name in missing:
                missing.remove(name)
            else:
                unexpected.append(name)
    return missing, unexpected


def complain(model: torch.nn.Module, missing: set[str], unexpected: list[str]) -> NoReturn:
    """Raise torch's error for names that are missing or left over, in safetensors' words."""
    text = f"Error(s) in loading state_dict for {type(model).__name__}:"
    for kind, names in (("Missing", missing), ("Unexpected", unexpected)):
        if names:
            listed = ", ".join(f'"{name}"' for name in sorted(names))
            text += f"\n    {kind} key(s) in state_dict: {listed}"
    raise RuntimeError(text)


def tied_names(model: torch.nn.Module, preferred: Mapping[str, object]) -> dict[str, list[str]]:
    """Name -> the model's other names for the same memory; of several the one in `preferred` is kept."""
    areas: dict[object, list[tuple[int, int, str]]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    complete = set()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            continue
        key = _memory_of(tensor)
        if tensor.is_meta:  # has no addresses: what is one object is tied
            areas[id(tensor)].append((0, 1, name))
            complete.add(name)
        elif key is not None:
            begin = tensor.data_ptr()
            steps = sum(
                (length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            areas[key].append(
                (begin, begin + (steps + 1) * tensor.element_size() if tensor.numel() else begin, name)
            )
            if (begin, tensor.numel() * tensor.element_size()) == key[1:]:
                complete.add(name)
    ties = {}
    for group in (group for found in areas.values() for group in _overlapping(found) if len(group) > 1):
        whole = sorted(complete.intersection(group))
        if not whole:
            raise RuntimeError(
                f"{type(model).__name__}: the tensors {sorted(group)} share memory and none covers all of "
                "it, so that no name can stand for the others; give them memory of their own (clone)"
            )
        kept = next((name for name in whole if name in preferred), whole[0])
        ties[kept] = sorted(group - {kept})
    return ties


def _memory_of(tensor: torch.Tensor) -> tuple[torch.device, int, int] | None:
    """Device, address and bytes of a storage; None if it has none."""
    if tensor.is_meta:
        return None
    storage = tensor.untyped_storage()
    key = tensor.device, storage.data_ptr(), storage.nbytes()
    return key if key[1] and key[2] else None


def _overlapping(areas: list[tuple[int, int, str]]) -> Iterator[set[str]]:
    group: set[str] = set()
    end = -1
    for begin, stop, name in sorted(areas):
        if group and begin >= end:
            yield group
            group = set()
        group.add(name)
        end = max(end, stop)
    if group:
        yield group


def _is_hooked(model: torch.nn.Module) -> bool:
    """Whether hooks may rename and reshape what the file has, so that names tell nothing before they ran."""
    return type(model).load_state_dict is not torch.nn.Module.load_state_dict or any(
        module._load_state_dict_pre_hooks for module in model.modules()
    )


def _load_hooked(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Any:
    """torch puts the tensors in place of the model's own; then these take over what those show."""
    places: dict[int, list[_Place]] = defaultdict(list)
    before: dict[int, torch.Tensor] = {}
    for _, place, tensor in _tensors(model, every=True):
        before[id(tensor)] = tensor
        places[id(tensor)].append(place)
    try:
        return model.load_state_dict(dict(state), strict=False, assign=True)
    finally:  # it may raise after it has assigned
        for key, tensor in before.items():
            found = [store[name] for store, name in places[key] if store[name] is not tensor]
            if found:
                kept = _replace(tensor, _fitted(tensor, found[0].detach()), places[key])
                for store, name in places[key]:
                    store[name] = kept


def _assign(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`state`, with what is in the model now in place of what was put there."""
    loaded: dict[str, Any] = dict(state)
    places: dict[int, list[_Place]] = defaultdict(list)
    users: dict[object, set[int]] = defaultdict(set)
    for _, place, tensor in _tensors(model):
        places[id(tensor)].append(place)
        users[_memory_of(tensor) if tensor.layout is torch.strided else None].add(id(tensor))
    for name, place, tensor in _tensors(model):
        given = state.get(name)
        if given is None or not _can_replace(tensor, given):
            continue
        memory = _memory_of(tensor)
        if memory is not None and len(users[memory]) > 1:
            continue  # tied by memory and not by being one object: only copying keeps it tied
        loaded[name] = _replace(tensor, given, places.pop(id(tensor), [place]))
        places[id(loaded[name])].append(place)
    return loaded


def _allocate(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Memory for what has none yet and was not replaced, so that torch can copy to it."""
    places: dict[int, list[_Place]] = defaultdict(list)
    named: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, place, tensor in _tensors(model, every=True):
        given = state.get(name)
        if tensor.is_meta:
            places[id(tensor)].append(place)
            if given is not None and not given.is_meta and given.shape == tensor.shape:
                named.setdefault(id(tensor), (tensor, given))
    for key, (tensor, given) in named.items():
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=given.device)
        _replace(tensor, made, places[key])


def _tensors(model: torch.nn.Module, *, every: bool = False) -> Iterator[tuple[str, _Place, torch.Tensor]]:
    """Full names of what modules load, tied ones more than once, in torch's order; of those only that load
    the ordinary way unless `every`."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        # torch's own modules only look at versions there; what others do there cannot be known.
        ordinary = type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        for store in (module._parameters, module._buffers) if ordinary or every else ():
            for name, tensor in list(store.items()):
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, (store, name), tensor


def _can_replace(tensor: torch.Tensor, given: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.nn.Parameter, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.shape == given.shape
        and tensor.dtype == given.dtype
        and _steps(tensor) == _steps(given)  # a memory format makes other kernels run, with other last bits
        and not given.is_meta
        and (tensor.is_meta or tensor.device == given.device)
    )


def _steps(tensor: torch.Tensor) -> list[int]:
    return [step for step, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]


def _fitted(tensor: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """`given`, or a copy of it that has the dtype, the strides and the device of `tensor`."""
    if _can_replace(tensor, given) or given.shape != tensor.shape:
        return given
    device = given.device if tensor.is_meta else tensor.device
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.copy_(given)


def _replace(tensor: torch.Tensor, given: torch.Tensor, places: list[_Place]) -> torch.Tensor:
    """Make the model's `tensor` show the memory of `given`; the tensor that is in the model then."""
    if not tensor.is_meta:
        tensor.data = given
        return tensor
    new = given.detach()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
    swap: Any = torch.utils.swap_tensors
    try:
        swap(tensor, new)
    except RuntimeError:  # somebody holds a weak reference to it, or a graph does
        for store, name in places:
            store[name] = new
        return new
    return tensor
