# SPDX-License-Identifier: Apache-2.0
"""While lazymem is installed, transformers' own from_pretrained takes snapshots and URLs."""

from __future__ import annotations

import json
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


def test_processors_and_configurations_take_snapshots_and_urls(s3: Bucket, tmp_path: Path) -> None:
    """Auto classes, the classes themselves, and the configuration as a dict; restored afterwards."""
    folder = tmp_path / "wav"
    config = hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=6,
        conv_dim=[8], conv_kernel=[3], conv_stride=[2], num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
    )  # fmt: skip
    hf.Wav2Vec2Model(config).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, "<s>": 3, "</s>": 4, "A": 5}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=12345)
    hf.Wav2Vec2Processor(extractor, hf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))).save_pretrained(
        folder
    )
    extractor.save_pretrained(folder)
    lazymem.build(folder, tmp_path / "wav.lzm")
    s3.put("wav.lzm", (tmp_path / "wav.lzm").read_bytes())
    owners = (hf.AutoProcessor, hf.ProcessorMixin, hf.AutoFeatureExtractor, hf.FeatureExtractionMixin)
    methods = [vars(owner)["from_pretrained"] for owner in owners]
    with lazymem.safetensors.install():
        for source in (tmp_path / "wav.lzm", s3.url("wav.lzm")):
            for auto, owner in (
                (hf.AutoFeatureExtractor, hf.Wav2Vec2FeatureExtractor),
                (hf.AutoProcessor, hf.Wav2Vec2Processor),
            ):
                for found in (auto.from_pretrained(source), owner.from_pretrained(source)):
                    assert type(found) is owner
                    assert getattr(found, "feature_extractor", found).sampling_rate == 12345
            assert hf.AutoProcessor.from_pretrained(source).tokenizer.get_vocab() == vocabulary
            found, rest = hf.PreTrainedConfig.get_config_dict(source, other=1)
            assert found["hidden_size"] == 16
            assert rest["other"] == 1
            assert hf.Wav2Vec2Config.get_config_dict(source)[0] == found
    assert [vars(owner)["from_pretrained"] for owner in owners] == methods


def test_image_processors_take_snapshots(tmp_path: Path) -> None:
    """With `backend` for transformers, which has one of that name itself."""
    pytest.importorskip("PIL")
    folder = tmp_path / "vit"
    folder.mkdir()
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 9}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4,
    )  # fmt: skip
    hf.ViTModel(config).save_pretrained(folder)
    lazymem.build(folder, tmp_path / "vit.lzm")
    with lazymem.safetensors.install():
        found = hf.AutoImageProcessor.from_pretrained(tmp_path / "vit.lzm", backend="pil")
        assert (found.size["height"], found.size["width"]) == (8, 9)
        again = type(found).from_pretrained(tmp_path / "vit.lzm", storage_options={"timeout": 5})
        assert again.to_dict() == found.to_dict()
