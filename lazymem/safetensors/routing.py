# SPDX-License-Identifier: Apache-2.0
"""While lazymem is installed in safetensors' place: transformers and accelerate take URLs and snapshots.

Both look for files themselves before they open any, and know folders and hub names only. So transformers'
from_pretrained methods are replaced, too: those of models by `lazymem.transformers.from_pretrained`, those of
configurations, tokenizers and processors by themselves on a temporary folder; and accelerate's functions by
those of `checkpoints`. Every other source goes the old way. Modules that are imported later are seen to as
they are imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

from ..exchange import exchange
from ..options import BACKENDS
from . import checkpoints
from .checkpoints import is_for_lazymem

_LOADS: Final = ("from_pretrained",)
_CONFIGURES: Final = ("from_pretrained", "get_config_dict")
#: Module -> classes, and which of their methods are replaced.
_CLASSES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "transformers.modeling_utils": {"PreTrainedModel": _LOADS},
    "transformers.models.auto.auto_factory": {"_BaseAutoModelClass": _LOADS},
    "transformers.models.auto.configuration_auto": {"AutoConfig": _LOADS},
    "transformers.models.auto.tokenization_auto": {"AutoTokenizer": _LOADS},
    "transformers.models.auto.feature_extraction_auto": {"AutoFeatureExtractor": _LOADS},
    "transformers.models.auto.image_processing_auto": {"AutoImageProcessor": _LOADS},
    "transformers.models.auto.video_processing_auto": {"AutoVideoProcessor": _LOADS},
    "transformers.models.auto.processing_auto": {"AutoProcessor": _LOADS},
    "transformers.configuration_utils": {"PreTrainedConfig": _CONFIGURES, "PretrainedConfig": _CONFIGURES},
    "transformers.tokenization_utils_base": {"PreTrainedTokenizerBase": _LOADS},
    "transformers.feature_extraction_utils": {"FeatureExtractionMixin": _LOADS},
    "transformers.image_processing_base": {"ImageProcessingMixin": _LOADS},
    "transformers.video_processing_utils": {"BaseVideoProcessor": _LOADS},
    "transformers.processing_utils": {"ProcessorMixin": _LOADS},
    "transformers.generation.configuration_utils": {"GenerationConfig": _CONFIGURES},
}
_MODELS: Final = {"PreTrainedModel", "_BaseAutoModelClass"}


class Routing:
    """The replaced methods and functions, and the finder that waits for modules."""

    def __init__(self) -> None:
        self._methods: list[tuple[type, str, Any]] = []
        self._functions: list[tuple[Any, Any]] = []
        self._finder = _Finder(self._replace)
        # Another thread may be in the middle of an import that the finder waits for.
        self._lock = threading.Lock()
        self._active = False

    def apply(self) -> None:
        self._active = True
        sys.meta_path.insert(0, self._finder)
        for name in _SEEN:
            if name in sys.modules:
                self._replace(sys.modules[name])

    def undo(self) -> None:
        sys.meta_path.remove(self._finder)
        with self._lock:
            self._active = False
            for owner, name, method in self._methods:
                setattr(owner, name, method)
            self._methods.clear()
            exchange([(ours, theirs) for theirs, ours in self._functions])
            self._functions.clear()

    def _replace(self, module: ModuleType) -> None:
        with self._lock:
            if not self._active:
                return
            if module.__name__ == checkpoints.MODULE:
                self._replace_functions(module)
            for owner, names in _CLASSES.get(module.__name__, {}).items():
                for name in names:
                    self._replace_method(getattr(module, owner, None), name)

    def _replace_functions(self, module: ModuleType) -> None:
        if not self._functions:
            self._functions = checkpoints.pairs(module)
            exchange(self._functions)

    def _replace_method(self, owner: Any, name: str) -> None:
        method = vars(owner).get(name) if isinstance(owner, type) else None
        if method is None or any(known[:2] == (owner, name) for known in self._methods):
            return
        self._methods.append((owner, name, method))
        setattr(owner, name, _replacement(method, owner.__name__ in _MODELS))


def _replacement(method: Any, is_model: bool) -> Any:
    original = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method

    @functools.wraps(original)
    def load(cls: Any, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        if source is None:
            source = kwargs.pop("pretrained_model_name_or_path", None)
        if not is_for_lazymem(source):
            call = method.__get__(None, cls)
            return call(source, *args, **kwargs)
        from .. import transformers as front

        if is_model:
            return front.from_pretrained(source, *args, model_class=cls, **kwargs)
        options: dict[str, Any] = {
            name: kwargs.pop(name) for name in ("storage_options", "cache") if name in kwargs
        }
        if kwargs.get("backend") in BACKENDS:  # tokenizers and image processors have some of their own
            options["backend"] = kwargs.pop("backend")
        with front.local_files(source, **options) as folder:
            return method.__get__(None, cls)(folder, *args, **kwargs)

    return classmethod(load)


_SEEN: Final = {*_CLASSES, checkpoints.MODULE}


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `seen` with each of the modules when it has been imported."""

    def __init__(self, seen: Callable[[ModuleType], None]) -> None:
        self._seen = seen

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _SEEN:
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
