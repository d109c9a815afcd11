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
#: What works on the last layer's output, after its norm. (GGUF: output.)
_HEADS: Final = re.compile(
    r"^(.*_)?(head|heads|classifier|score|pooler|cls|outputs?|logits|logits_bias|logit_scale|predictions|"
    r"lm_loss|embed_out|proj_out|project_out|visual_projection|text_projection|"
    r"vocab_transform|vocab_layer_norm|vocab_projector)$"
)
#: The norm after the last layer of a stack. (GGUF: output_norm.) Others stand before the first: pre_norm,
#: word_embeddings_layernorm, DeBERTa's encoder.LayerNorm.
_LAST_NORM: Final = re.compile(
    r"^((final|post|last|output|out|encoder|decoder|fc)_)?(layer_?norm|rms_norm|norm|ln)(_(f|final|post|out))?$"
)
_ENCODER: Final = re.compile(r"(^|_)enc(oder)?$")
_DECODER: Final = re.compile(r"(^|_)dec(oder)?$")
_BEYOND: Final = 1 << 62  # any layer's number
_ATTENTION: Final = re.compile(r"attn|attention|input_layernorm|ln_1$|norm1$")
_CROSS: Final = re.compile(r"cross|encoder_attn|encdec")


def model_order(names: Iterable[str]) -> list[str]:
    """The names, first needed first: embeddings, layers by number, the last norm, the head.

    Within a layer attention comes before cross-attention and the rest; an encoder's layers and last norm
    before a decoder's.
    """
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[int, bool, tuple[int, ...], int]:
    parts = _PART.split(name)
    modules = parts[:-1] or parts
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10)
    if not numbers:
        return _rank_unnumbered(modules)
    if any(_HEADS.match(part) for part in modules[:1]):
        return 2, False, (), 1
    within = 1 if _CROSS.search(name) else 0 if _ATTENTION.search(name) else 2
    return 1, any(_DECODER.search(part) for part in parts), numbers[:1], within


def _rank_unnumbered(modules: list[str]) -> tuple[int, bool, tuple[int, ...], int]:
    # BERT's and others' tied output layer is a lone module called decoder.
    if any(_HEADS.match(part) for part in modules) or modules == ["decoder"]:
        return 2, False, (), 1
    if not _LAST_NORM.match(modules[-1]) or any("emb" in part for part in modules):
        return 0, False, (), 0
    if any(_ENCODER.search(part) for part in modules[:-1]):
        return 1, False, (_BEYOND,), 0
    return 2, False, (), 0
