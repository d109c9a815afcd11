# SPDX-License-Identifier: Apache-2.0
"""The order in which a model's forward pass needs its weights, told from their names.

The names are those that torch modules and GGUF give: a path of parts, layers by number. What cannot be
told stays in the order in which it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_PART: Final = re.compile(r"[./]")
#: What works on the last layer's output. (GGUF: output_norm, output.)
_HEADS: Final = re.compile(
    r"^(.*_)?(lm_head|head|heads|classifier|score|pooler|cls|qa_outputs|logits|output_norm|output|"
    r"ln_f|final_layernorm|final_layer_norm|final_norm|norm|embed_out)$"
)
_DECODER: Final = re.compile(r"(^|_)decoder$")
_ATTENTION: Final = re.compile(r"attn|attention|input_layernorm|ln_1$|norm1$")
_CROSS: Final = re.compile(r"cross|encoder_attn|encdec")


def model_order(names: Iterable[str]) -> list[str]:
    """The names, first needed first: embeddings, layers by number, the head.

    Within a layer attention comes before cross-attention and the rest; an encoder's layers before a
    decoder's.
    """
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[int, bool, tuple[int, ...], int]:
    parts = _PART.split(name)
    modules = parts[:-1] or parts
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10)
    if any(_HEADS.match(part) for part in (modules if not numbers else modules[:1])):
        return 2, False, (), 0
    if not numbers:
        return 0, False, (), 0
    within = 1 if _CROSS.search(name) else 0 if _ATTENTION.search(name) else 2
    return 1, any(_DECODER.search(part) for part in parts), numbers[:1], within
