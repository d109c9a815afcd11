# SPDX-License-Identifier: Apache-2.0
"""Weights as torch tensors that share a region: nothing is copied, nothing is read before it is used.

    tensors = lazymem.torch.load_file("s3://bucket/model.safetensors")
    lazymem.torch.load_model(model, "model.lzm", background=True)

Sources are those of `lazymem.open`: .lzm, .safetensors (a file, a folder of shards or their index), torch's
own .pt and .bin, .gguf, local or by URL. Tensors are copy-on-write: what is written to them stays in this
process. They keep the region alive. Needs torch: pip install 'lazymem[torch]'.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("tensors need torch, which is not installed: pip install 'lazymem[torch]'") from error

from .loading import load_file, load_model, open
from .mapping import Tensors

__all__ = ["Tensors", "load_file", "load_model", "open"]
