# SPDX-License-Identifier: Apache-2.0
"""Small transformers models with random weights, saved as a hub would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCABULARY = 300


def _bert() -> Any:
    return hf.BertModel(
        hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=128,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1
        )
    )  # fmt: skip


def llama(layers: int = 3, tied: bool = True, width: int = 64) -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=2 * width, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def mixtral(layers: int = 2, width: int = 64, experts: int = 8) -> Any:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=2 * width, num_local_experts=experts,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "gpt2": _gpt2,  # tied embeddings, Conv1D
    "llama": llama,  # tied embeddings
    "mixtral": mixtral,  # experts that transformers fuses
}


def save(model: Any, folder: Path, dtype: torch.dtype, *, sharded: bool = False) -> Path:
    """The model in `dtype`, in one file or in many."""
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if sharded else "5GB")
    return folder


def outputs(model: Any, tokens: int = 9) -> torch.Tensor:
    """Of the same input for every model."""
    ids = torch.arange(tokens).remainder(VOCABULARY).unsqueeze(0) * 7 % VOCABULARY
    with torch.no_grad():
        found: torch.Tensor = model(ids)[0]
    return found
