# SPDX-License-Identifier: Apache-2.0
"""A small Llama with random weights, in every format that a contender reads, and its greedy tokens.

Weights are drawn as transformers initialises them: normal noise of scale 0.02, as bfloat16. Names of files
are those of a hub. Imports torch only inside functions: most of this program does without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from .data import SEED, Data, digest
from .harness import in_child

#: Threads of torch: of every contender alike.
THREADS: Final = min(2, len(os.sched_getaffinity(0)))
PROMPT: Final = tuple(range(1, 9))
_WIDTH, _TINY_WIDTH = 2048, 256
_VOCABULARY: Final = 8192  # embeddings and head: 6 % of the weights


@dataclass(frozen=True)
class Llama:
    """The model's files, each made when it is first asked for. `count`: tokens that are generated."""

    data: Data
    count: int
    tiny: bool

    def config(self) -> Any:
        """As large as `data.nbytes` says, to a layer."""
        from transformers import LlamaConfig

        width = _TINY_WIDTH if self.tiny else _WIDTH
        heads, vocabulary, inner = width // 64, _VOCABULARY * width // _WIDTH, width * 11 // 4
        layer = 2 * (2 * width * width + 2 * width * width // 8 + 3 * width * inner)
        layers = max(2, round((self.data.nbytes - 4 * vocabulary * width) / layer))
        return LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 8 or 1, head_dim=64,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def folder(self) -> Path:
        """config.json and model.safetensors, as a hub would have them."""

        def make(target: Path) -> None:
            import torch
            from transformers import LlamaForCausalLM

            torch.manual_seed(SEED)
            LlamaForCausalLM(self.config()).to(torch.bfloat16).save_pretrained(target)

        return self.data.made("llama", make)

    def safetensors(self) -> Path:
        return self.folder() / "model.safetensors"

    def bin(self) -> Path:
        """torch.save of the state dict."""
        source = self.safetensors()

        def make(target: Path) -> None:
            import torch
            from safetensors.torch import load_file

            torch.save(load_file(source), target)

        return self.data.made("llama.bin", make)

    def tensors(self) -> Path:
        """tensorizer's format."""
        source = self.safetensors()

        def make(target: Path) -> None:
            from safetensors.torch import load_file
            from tensorizer import TensorSerializer

            serializer = TensorSerializer(str(target))
            serializer.write_state_dict(load_file(source))
            serializer.close()

        return self.data.made("llama.tensors", make)

    def zipnn(self) -> Path:
        """A safetensors file whose tensors ZipNN has compressed, as its own script writes it."""
        source = self.safetensors()

        def make(target: Path) -> None:
            import torch
            from safetensors.torch import load_file, save_file
            from zipnn import ZipNN
            from zipnn.util_safetensors import (
                build_compressed_tensor_info,
                set_compressed_tensors_metadata,
            )

            tensors, infos, metadata = {}, {}, {"format": "pt"}
            for name, tensor in load_file(source).items():
                packed = ZipNN(input_format="torch").compress(tensor.clone())
                tensors[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
                infos[name] = build_compressed_tensor_info(tensor)
            set_compressed_tensors_metadata(infos, metadata)
            save_file(tensors, target, metadata)

        return self.data.made("llama-zipnn.safetensors", make)

    def snapshot(self, codec: str) -> Path:
        """The whole folder as one .lzm."""
        source = self.folder()
        return self.data.made(f"llama-{codec}.lzm", lambda target: lazymem.build(source, target, codec=codec))

    def tokens_digest(self) -> int:
        """Of what transformers generates by itself."""
        folder = self.folder()

        def compute() -> int:
            from transformers import LlamaForCausalLM

            start_torch()
            return digest(np.array(generate(LlamaForCausalLM.from_pretrained(folder), self.count)[0]))

        value: int = in_child(compute, deadline=120)
        return value

    def first_layer(self) -> list[str]:
        """Names of the first layer's weights, sorted."""
        with lazymem.open(self.safetensors()) as snapshot:
            return sorted(name for name in snapshot if name.startswith("model.layers.0."))

    def first_layer_digest(self) -> int:
        path, names = self.safetensors(), self.first_layer()

        def compute() -> int:
            with lazymem.open(path) as snapshot:
                return digest([snapshot[name] for name in names])

        value: int = in_child(compute, deadline=60)
        return value


def start_torch() -> None:
    """As every contender has it; and what torch and transformers do once a process, on a model of some KB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    generate(LlamaForCausalLM(config).to(torch.bfloat16), 2)


def skeleton(config: Any) -> Any:
    """The model without memory for weights; buffers that no file has are real."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


class _Clock:
    """What `generate` tells of each token, at once."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, count: int) -> tuple[Sequence[int], float]:
    """Greedy tokens after a fixed prompt, and when (perf_counter) the first one was there."""
    import torch

    clock, prompt = _Clock(), torch.tensor([PROMPT]) % model.config.vocab_size
    with torch.inference_mode():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, streamer=clock,
        )  # fmt: skip
    return found[0, len(PROMPT) :].tolist(), clock.times[1]  # the prompt itself is told first
