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
        "encoder.final_layer_norm.weight",
        *(f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(12)),
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    ],
    "t5 gguf": [
        "token_embd.weight",
        *(f"enc.blk.{i}.attn_q.weight" for i in range(12)),
        "enc.output_norm.weight",
        *(f"dec.blk.{i}.attn_q.weight" for i in range(12)),
        "dec.output_norm.weight",
        "output.weight",
    ],
    "whisper": [
        "model.encoder.conv1.weight",
        *(f"model.encoder.layers.{i}.fc1.weight" for i in range(12)),
        "model.encoder.layer_norm.weight",
        *(f"model.decoder.layers.{i}.fc1.weight" for i in range(12)),
        "model.decoder.layer_norm.weight",
        "proj_out.weight",
    ],
    "mamba": [
        "backbone.embeddings.weight",
        *(f"backbone.layers.{i}.mixer.in_proj.weight" for i in range(12)),
        "backbone.norm_f.weight",
        "lm_head.weight",
    ],
    "vit": [
        "vit.embeddings.cls_token",
        *(f"vit.encoder.layer.{i}.output.dense.weight" for i in range(12)),
        "vit.layernorm.weight",
        "classifier.weight",
    ],
    "bert with heads": [
        "bert.embeddings.LayerNorm.weight",
        *(f"bert.encoder.layer.{i}.output.LayerNorm.weight" for i in range(12)),
        "cls.predictions.transform.LayerNorm.weight",
    ],
    "modernbert": [
        "model.embeddings.norm.weight",
        *(f"model.layers.{i}.mlp_norm.weight" for i in range(12)),
        "model.final_norm.weight",
        "decoder.weight",
    ],
    "distilbert": [
        "distilbert.embeddings.LayerNorm.weight",
        *(f"distilbert.transformer.layer.{i}.ffn.lin1.weight" for i in range(12)),
        "pre_classifier.weight",
    ],
    "bloom": [
        "transformer.word_embeddings_layernorm.weight",
        *(f"transformer.h.{i}.mlp.dense_h_to_4h.weight" for i in range(12)),
        "transformer.ln_f.weight",
    ],
    "clip": [
        "vision_model.pre_layrnorm.weight",
        *(f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(12)),
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
    ],
    "bart": [
        "model.encoder.layernorm_embedding.weight",
        *(f"model.encoder.layers.{i}.fc1.weight" for i in range(12)),
        *(f"model.decoder.layers.{i}.fc1.weight" for i in range(12)),
        "final_logits_bias",
    ],
    "gguf": [
        "token_embd.weight",
        *(f"blk.{i}.attn_q.weight" for i in range(12)),
        "output.weight",
    ],
}


def group(name: str) -> tuple[str, ...]:
    """One layer, or a name outside of the layers: within a layer any order will do."""
    parts = name.split(".")
    return tuple(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)]) or (name,)


@pytest.mark.parametrize("model", MODELS)
def test_model_order_goes_layer_by_layer(model: str) -> None:
    names = list(MODELS[model])
    wanted = list(dict.fromkeys(map(group, names)))
    shuffled = sorted(names)
    random.Random(4).shuffle(shuffled)
    assert list(dict.fromkeys(map(group, model_order(shuffled)))) == wanted


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
