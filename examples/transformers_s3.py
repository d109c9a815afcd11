# SPDX-License-Identifier: Apache-2.0
"""A transformers model straight from a bucket: ready at once, its weights are read as layers run.

    lazymem build MODEL_FOLDER s3://bucket/model.lzm
    python examples/transformers_s3.py s3://bucket/model.lzm

Needs pip install 'lazymem[transformers]'. Credentials and endpoint are found as boto3 finds them.
"""

import sys
import time

import torch

import lazymem.transformers

url = sys.argv[1]
started = time.perf_counter()
model = lazymem.transformers.from_pretrained(url, background=True)
print(f"ready: {type(model).__name__} after {time.perf_counter() - started:.2f} s")

ids = torch.tensor([[1, 2, 3, 4]])
with torch.no_grad():
    output = model(ids)[0]  # layers run while the later ones arrive
print(f"output: {list(output.shape)}, first pass done after {time.perf_counter() - started:.2f} s")
