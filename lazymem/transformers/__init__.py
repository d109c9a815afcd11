# SPDX-License-Identifier: Apache-2.0
"""transformers models whose weights load on first touch.

    model = lazymem.transformers.from_pretrained("s3://bucket/model.lzm")
    with lazymem.transformers.local_files("s3://bucket/model.lzm") as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

Sources are what `lazymem build FOLDER` made (one snapshot that carries weights, configuration and tokenizer),
and model folders as they are, local or by URL. Nothing is fetched from a hub. Needs torch and transformers:
pip install 'lazymem[transformers]'.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "models need transformers, which is not installed: pip install 'lazymem[transformers]'"
    ) from error

from .files import local_files
from .pretrained import from_pretrained

__all__ = ["from_pretrained", "local_files"]
