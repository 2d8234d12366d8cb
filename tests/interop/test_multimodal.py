"""Directories whose config.json nests the language model beside a vision tower, as the hub has Qwen3.5 and Llama 4.

The language model is the golden one of its family, under the names that transformers gives it within the whole.
"""

import jax
import numpy as np
import pytest

from research.interop import huggingface
from research.models.families import text_part
from tests.interop.checkpoints import golden, stored_in, write_checkpoint

QWEN = (
    lambda name: name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1),
    "model.visual.patch_embed.proj.weight",
    {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8},
)
# Family → the outer model_type and class, names of its tensors, one of the vision tower, and what else its config.json says.
WHOLES = {
    "qwen3_5": ("qwen3_5", "Qwen3_5ForConditionalGeneration", *QWEN),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", *QWEN),
    "llama4": (
        "llama4",
        "Llama4ForConditionalGeneration",
        lambda name: f"language_model.{name}",
        "vision_model.class_embedding",
        {"boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7},
    ),
}


def whole_of(name, g):
    kind, architecture, renamed, vision, others = WHOLES[name]
    inner = {key: value for key, value in g.hub.items() if key != "architectures"}
    hub = {
        "model_type": kind,
        "architectures": [architecture],
        "text_config": inner,
        "vision_config": {"depth": 2},
        "tie_word_embeddings": g.hub.get("tie_word_embeddings", False),
        "transformers_version": "5.23.0",
        **others,
    }
    tensors = {renamed(tensor): array for tensor, array in g.tensors.items()}
    return hub, {**tensors, vision: np.ones((2, 2), np.float32)}


@pytest.mark.parametrize("name", WHOLES)
def test_the_language_model_of_a_multimodal_directory(name, tmp_path):
    g, said = golden(name), []
    hub, tensors = whole_of(name, g)
    model = huggingface.load(write_checkpoint(tmp_path / "whole", hub, tensors, files=2), say=said.append)
    assert said == [f"left out 1 tensors that the model has no use for: {WHOLES[name][3]}"]
    alone = huggingface.load(write_checkpoint(tmp_path / "alone", g.hub, g.tensors))
    assert model.config == alone.config
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The way back is the language model's alone, which transformers opens.
    huggingface.save(model, hub, tmp_path / "again")
    again = stored_in(tmp_path / "again")
    assert set(again) == set(g.tensors)
    for tensor, values in g.tensors.items():
        np.testing.assert_array_equal(again[tensor], values, err_msg=tensor)
    written = huggingface.read_config(tmp_path / "again")
    assert written == {"tie_word_embeddings": False, **g.hub} and "text_config" not in written


def test_experts_that_are_stored_together(tmp_path):
    """[expert, out, in], as the hub has Qwen3.5's: one tensor where transformers writes two an expert."""
    g = golden("qwen3_5_moe")
    hub, tensors = whole_of("qwen3_5_moe", g)
    fused = {name: array for name, array in tensors.items() if ".experts." not in name}
    for n in range(g.hub["num_hidden_layers"]):
        experts = [f"model.language_model.layers.{n}.mlp.experts.{e}." for e in range(g.hub["num_experts"])]
        gate_up = [np.concatenate([tensors[f"{e}{part}_proj.weight"] for part in ("gate", "up")]) for e in experts]
        down = [tensors[f"{e}down_proj.weight"] for e in experts]
        prefix = experts[0].removesuffix("0.")
        fused |= {f"{prefix}gate_up_proj": np.stack(gate_up), f"{prefix}down_proj": np.stack(down)}
    one = huggingface.load(write_checkpoint(tmp_path / "one", hub, tensors), say=lambda line: None)
    other = huggingface.load(write_checkpoint(tmp_path / "other", hub, fused), say=lambda line: None)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    prefix = "model.language_model.layers.1.mlp.experts.down_proj"
    del fused[prefix]
    with pytest.raises(ValueError, match=r"tensors are missing: model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        huggingface.load(write_checkpoint(tmp_path / "less", hub, fused))


def test_what_lies_round_the_language_model_is_known_or_refused():
    hub, _ = whole_of("qwen3_5", golden("qwen3_5"))
    with pytest.raises(ValueError, match=r"nothing here reads audio_config"):
        text_part({**hub, "audio_config": {}})
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, and in text_config False"):
        text_part(
            {**hub, "tie_word_embeddings": True, "text_config": {**hub["text_config"], "tie_word_embeddings": False}}
        )
    with pytest.raises(ValueError, match=r"\['Gemma3ForConditionalGeneration'\] around .* known are Llama4"):
        text_part({**hub, "architectures": ["Gemma3ForConditionalGeneration"]})
