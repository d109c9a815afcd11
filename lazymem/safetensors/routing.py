# SPDX-License-Identifier: Apache-2.0
"""While lazymem is installed in safetensors' place: transformers' from_pretrained takes URLs and snapshots.

transformers looks for files itself before it opens any, and knows folders and hub names only. So its
from_pretrained methods are replaced, too: those of models by `lazymem.transformers.from_pretrained`, those of
configurations and tokenizers by themselves on a temporary folder. Every other source goes the old way.
Modules that are imported later are seen to as they are imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

from ..store import locations

#: Module -> classes whose from_pretrained is replaced; True: of models.
_CLASSES: Final = {
    "transformers.modeling_utils": (("PreTrainedModel", True),),
    "transformers.models.auto.auto_factory": (("_BaseAutoModelClass", True),),
    "transformers.models.auto.configuration_auto": (("AutoConfig", False),),
    "transformers.models.auto.tokenization_auto": (("AutoTokenizer", False),),
    "transformers.configuration_utils": (("PreTrainedConfig", False), ("PretrainedConfig", False)),
    "transformers.tokenization_utils_base": (("PreTrainedTokenizerBase", False),),
    "transformers.generation.configuration_utils": (("GenerationConfig", False),),
}
_OURS: Final = ("storage_options", "cache", "backend")


class Routing:
    """The replaced methods, and the finder that waits for modules."""

    def __init__(self) -> None:
        self._methods: list[tuple[type, Any]] = []
        self._finder = _Finder(self._replace)

    def apply(self) -> None:
        for name in _CLASSES:
            if name in sys.modules:
                self._replace(sys.modules[name])
        sys.meta_path.insert(0, self._finder)

    def undo(self) -> None:
        sys.meta_path.remove(self._finder)
        for owner, method in self._methods:
            owner.from_pretrained = method  # type: ignore[attr-defined]
        self._methods.clear()

    def _replace(self, module: ModuleType) -> None:
        for name, is_model in _CLASSES[module.__name__]:
            owner = getattr(module, name, None)
            method = vars(owner).get("from_pretrained") if isinstance(owner, type) else None
            if method is None or any(known is owner for known, _ in self._methods):
                continue
            assert isinstance(owner, type)
            self._methods.append((owner, method))
            owner.from_pretrained = _replacement(method, is_model)  # type: ignore[attr-defined]


def _is_for_lazymem(source: object) -> bool:
    if not isinstance(source, (str, os.PathLike)):
        return False
    location = os.fspath(source)
    return isinstance(location, str) and (
        locations.scheme_of(location) is not None or location.endswith(".lzm")
    )


def _replacement(method: Any, is_model: bool) -> Any:
    original = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method

    @functools.wraps(original)
    def from_pretrained(cls: Any, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        if source is None:
            source = kwargs.pop("pretrained_model_name_or_path", None)
        if not _is_for_lazymem(source):
            call = method.__get__(None, cls)
            return call(source, *args, **kwargs)
        from .. import transformers as front

        if is_model:
            return front.from_pretrained(source, *args, model_class=cls, **kwargs)
        options = {name: kwargs.pop(name) for name in _OURS if name in kwargs}
        with front.local_files(source, **options) as folder:
            return method.__get__(None, cls)(folder, *args, **kwargs)

    return classmethod(from_pretrained)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `seen` with each of the modules when it has been imported."""

    def __init__(self, seen: Callable[[ModuleType], None]) -> None:
        self._seen = seen

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _CLASSES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._seen(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
