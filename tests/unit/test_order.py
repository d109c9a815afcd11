# SPDX-License-Identifier: Apache-2.0
"""The order in which a model needs its weights, and how progress is told."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem.order import model_order
from lazymem.progress import reporting

#: Names as their libraries give them, in the order that a forward pass needs.
MODELS = {
    "llama": [
        "model.embed_tokens.weight",
        *(
            f"model.layers.{i}.{name}.weight"
            for i in range(12)
            for name in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj", "post_attention_layernorm")
        ),
        "model.norm.weight",
        "lm_head.weight",
    ],
    "gpt2": [
        "transformer.wte.weight",
        *(f"transformer.h.{i}.{name}" for i in range(12) for name in ("attn.c_attn.weight", "mlp.c_fc.bias")),
        "transformer.ln_f.weight",
    ],
    "bert": [
        "embeddings.word_embeddings.weight",
        *(f"encoder.layer.{i}.output.dense.weight" for i in range(12)),
        "pooler.dense.weight",
    ],
    "t5": [
        "shared.weight",
        *(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(12)),
        *(f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(12)),
        "lm_head.weight",
    ],
    "gguf": [
        "token_embd.weight",
        *(f"blk.{i}.attn_q.weight" for i in range(12)),
        "output.weight",
    ],
}


def group(name: str) -> tuple[str, ...]:
    """Embeddings, one layer, or the head: within it any order will do."""
    parts = name.split(".")
    return tuple(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)]) or (name,)


@pytest.mark.parametrize("model", MODELS)
def test_model_order_goes_layer_by_layer(model: str) -> None:
    names = list(MODELS[model])
    wanted = list(dict.fromkeys(map(group, names)))
    shuffled = sorted(names)
    random.Random(4).shuffle(shuffled)
    head = [
        g
        for g in wanted
        if g[0].startswith(("lm_head", "model.norm", "transformer.ln_f", "pooler", "output"))
    ]
    found = list(dict.fromkeys(map(group, model_order(shuffled))))
    assert [g for g in found if g not in head] == [g for g in wanted if g not in head]
    assert set(found[len(found) - len(head) :]) == set(head)


def test_attention_comes_before_the_rest_of_its_layer() -> None:
    names = ["layers.0.mlp.up.weight", "layers.0.attn.q.weight", "layers.1.mlp.up.weight"]
    assert model_order(names) == [
        "layers.0.attn.q.weight",
        "layers.0.mlp.up.weight",
        "layers.1.mlp.up.weight",
    ]


def test_names_that_tell_nothing_keep_their_order() -> None:
    assert model_order(["b", "a", "", "..", "c.٣.d"]) == ["b", "a", "", "..", "c.٣.d"]


def test_progress_goes_up_to_all_of_it(tmp_path: Path) -> None:
    lazymem.build({"x": np.ones(1 << 20), "y": np.ones(9)}, tmp_path / "x.lzm", chunk_size=64 << 10)
    told: list[tuple[int, int]] = []
    with lazymem.open(tmp_path / "x.lzm") as snap:
        snap.prefetch(wait=True, progress=lambda done, total: told.append((done, total)))
        snap.prefetch("y", wait=True, progress=True)  # no terminal, no bar
        total = snap.chunk_count * snap.chunk_size
        with pytest.raises(lazymem.OptionError, match="wait=True"):
            snap.prefetch(progress=True)
        with pytest.raises(lazymem.OptionError, match="'given' or 'model'"):
            snap.prefetch(order="random")
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_reporting_shows_nothing_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with reporting(True, "loading") as report:
        assert report is not None
        report(1, 2)
    with reporting(None, "loading") as report:
        assert report is None
    assert capfd.readouterr() == ("", "")
