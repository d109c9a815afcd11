# SPDX-License-Identifier: Apache-2.0
"""While lazymem is installed, transformers' own from_pretrained takes snapshots and URLs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import lazymem  # noqa: E402
import lazymem.safetensors  # noqa: E402

from ..children import check_child  # noqa: E402

if TYPE_CHECKING:
    from ..servers.s3 import Bucket


def test_from_pretrained_takes_snapshots_and_urls(s3: Bucket, tmp_path: Path) -> None:
    """Models, configurations, tokenizers; imported before or after; and the old way again afterwards."""
    torch.manual_seed(2)
    model = hf.BertModel(
        hf.BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ).eval()
    model.save_pretrained(tmp_path / "bert")
    lazymem.build(tmp_path / "bert", tmp_path / "bert.lzm")
    s3.put("bert.lzm", (tmp_path / "bert.lzm").read_bytes())
    ids = torch.arange(7).unsqueeze(0)
    wanted = model(ids)[0]
    methods = [
        vars(owner)["from_pretrained"] for owner in (hf.PreTrainedModel, hf.AutoConfig, hf.GenerationConfig)
    ]
    with lazymem.safetensors.install():
        for source in (tmp_path / "bert.lzm", s3.url("bert.lzm")):
            assert torch.equal(hf.AutoModel.from_pretrained(source)(ids)[0], wanted)
            assert torch.equal(hf.BertModel.from_pretrained(source)(ids)[0], wanted)
            assert hf.AutoConfig.from_pretrained(source).hidden_size == 32
        assert torch.equal(hf.AutoModel.from_pretrained(tmp_path / "bert")(ids)[0], wanted)
    assert methods == [
        vars(owner)["from_pretrained"] for owner in (hf.PreTrainedModel, hf.AutoConfig, hf.GenerationConfig)
    ]
    with pytest.raises((OSError, ValueError)):
        hf.AutoModel.from_pretrained(str(tmp_path / "bert.lzm"))


def test_modules_imported_after_install_are_seen_to(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    lazymem.build(tmp_path / "bert", tmp_path / "bert.lzm")
    code = """
import sys
import lazymem.safetensors
installed = lazymem.safetensors.install()
assert "transformers" not in sys.modules
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
installed.uninstall()
assert not any("lazymem" in type(finder).__module__ for finder in sys.meta_path)
"""
    assert check_child(code, str(tmp_path / "bert.lzm"), env={"HF_HUB_OFFLINE": "1"}) == "BertModel\n"
