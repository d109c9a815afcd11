# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on weights that lie in a file: copy-on-write, the file stays as it is.

Needs pip install 'lazymem[torch]'.
"""

import hashlib
import tempfile
from pathlib import Path

import torch

import lazymem
import lazymem.torch


def make_model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.lzm")
    weights = {name: tensor.numpy() for name, tensor in make_model().state_dict().items()}
    lazymem.build(weights, path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # before or after: parameters stay the same
    lazymem.torch.load_model(model, path)
    inputs, wanted = torch.randn(256, 64), torch.randn(256, 1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), wanted)
        loss.backward()
        optimizer.step()  # writes to private copies of the pages that it changes
        losses.append(loss.item())
    print(f"loss:  {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("file as it was:", hashlib.sha256(path.read_bytes()).hexdigest() == before)
