"""The language model of checkpoints that also see pictures, against transformers on text."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.models.config import ModelConfig
from lowbit.models.registry import family_of
from models.family_cases import SIZES, check_logits, randomized

TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "depth": 1,
    "patch_size": 4,
    "out_hidden_size": 64,
    "in_channels": 3,
    "temporal_patch_size": 2,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LLAVA_VISION = {"vision_config": {"model_type": "siglip_vision_model", **SIGLIP}, "image_token_index": 130}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16}
PIXTRAL = {
    "model_type": "pixtral",
    **{key: SIGLIP[key] for key in SIGLIP if key != "hidden_size"},
    "hidden_size": 32,
    "head_dim": 16,
}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
QWEN35 = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]},
    "shared_expert_intermediate_size": 48,
}
HALF = {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
GLM_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "depth": 1,
    "patch_size": 4,
    "out_hidden_size": 64,
    "image_size": 16,
}
CHOSEN = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
VISION35 = QWEN_VISION | {"num_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "Qwen2VL": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2, "patch_size": 4},
    },
    "Qwen2_5_VL": {"text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "Qwen3VL": {
        "text_config": {"head_dim": 32, "rope_parameters": MROPE | {"mrope_section": [4, 6, 6]}},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "Qwen3VLMoe": {
        "text_config": {"rope_parameters": MROPE, **MIXTURE},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "Qwen3_5": {"text_config": QWEN35, "vision_config": VISION35},
    "Qwen3_5Moe": {"text_config": QWEN35 | MIXTURE, "vision_config": VISION35},
    "Glm4v": {"text_config": {"rope_parameters": MROPE | HALF}, "vision_config": GLM_VISION},
    "Glm46V": {
        "text_config": {"model_type": "glm4v_text", "rope_parameters": MROPE | HALF},
        "vision_config": GLM_VISION,
    },
    "Glm4vMoe": {
        "text_config": CHOSEN | {"rope_parameters": MROPE | HALF},
        "vision_config": GLM_VISION,
    },
    "Kimi_K25": {
        "text_config": {"model_type": "deepseek_v3"} | CHOSEN | LATENT,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 4,
        },
        "tie_word_embeddings": False,
    },
    "Gemma3": {
        "text_config": {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 48},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
    },
    "Mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
        "vision_config": PIXTRAL,
        "image_token_index": 130,
        "tie_word_embeddings": False,
    },
    "Mistral3 with Ministral3": {
        "text_config": {"model_type": "ministral3", "head_dim": 32, "rope_parameters": GROWING},
        "vision_config": PIXTRAL,
        "image_token_index": 130,
        "tie_word_embeddings": False,
    },
    "Llava": {"text_config": {"model_type": "llama"}, **LLAVA_VISION},
    "Llava with Mistral": {"text_config": {"model_type": "mistral", "sliding_window": 30}, **LLAVA_VISION},
    "Llava with Qwen2": {"text_config": {"model_type": "qwen2"}, **LLAVA_VISION},
    "Idefics3": {
        "text_config": {"model_type": "llama"},
        "vision_config": SIGLIP,
        "image_token_id": 130,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
}


def make(case: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model with its vision tower, saved by transformers."""
    name = case.split()[0]
    values = CASES[case]
    text = {**SIZES, **TOKENS, **values["text_config"]}
    config = getattr(transformers, f"{name}Config")(**{**TOKENS, **values, "text_config": text})
    model = randomized(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.save_pretrained(folder)
    if name == "Kimi_K25":  # the renaming of its vision blocks takes the text's layers along
        path = folder / "model.safetensors"
        tensors = {
            k.replace("_model.model.blocks.", "_model.model.layers."): t for k, t in load_file(path).items()
        }
        save_file(tensors, path)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_of_text(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle = make(case, tmp_path)
    with caplog.at_level(logging.INFO, logger="lowbit"):
        check_logits(tmp_path, oracle)
    said = [r.getMessage() for r in caplog.records if "beside the language model" in r.getMessage()]
    vision = [name for name in open_checkpoint(str(tmp_path)).tensors if "visi" in name or "visual" in name]
    assert len(said) == 1 and len(vision) > 5
    assert int(said[0].split()[1]) >= len(vision)
    plan = plan_model(open_checkpoint(str(tmp_path)))
    assert not any("visi" in module.name or "visual" in module.name for module in plan.modules)


def test_a_config_without_its_defaults(tmp_path: Path) -> None:
    """What google/gemma-3-4b-it leaves out of its text_config."""
    make("Gemma3", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    path.write_text(json.dumps(config | {"text_config": text}))
    header = open_checkpoint(str(tmp_path))
    found = family_of(header).read_config(header)
    assert (found.heads, found.kv_heads, found.head_dim, found.vocab_size) == (8, 4, 256, 262208)
    assert (found.context_length, found.rope_theta, found.local_rope_theta) == (131072, 1e6, 10000.0)
    assert found.attention_scale == 256**-0.5 and found.windows[:7] == (1024,) * 5 + (0, 1024)
    assert found.rope_scaling.factor == 8.0 and found.tied_head


def test_spellings_of_qwen2_vl(tmp_path: Path) -> None:
    """A flat config, as published, and tensors under the names of newer tools."""
    oracle = make("Qwen2VL", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    del text["rope_parameters"]
    section = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {**text, **config, "model_type": "qwen2_vl", "rope_scaling": section, "rope_theta": 10000.0}
    path.write_text(json.dumps(flat))
    check_logits(tmp_path, oracle)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    for name in list(tensors):
        for start, other in names.items():
            if name.startswith(start):
                tensors[other + name.removeprefix(start)] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    check_logits(tmp_path, oracle)


def test_another_language_model_inside_is_named(tmp_path: Path) -> None:
    make("Llava", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["model_type"] = "gptj"
    path.write_text(json.dumps(config))
    with pytest.raises(LowbitError, match=r"E0241.*the language model inside is 'gptj'"):
        load_model(open_checkpoint(str(tmp_path)), device="cpu")


def test_tensors_that_are_neither_text_nor_vision(tmp_path: Path) -> None:
    make("Llava", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["adapter.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LowbitError, match=r"E0217.*'adapter.weight' has no place"):
        load_model(open_checkpoint(str(tmp_path)), device="cpu")


TEXT_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral3": "Ministral3",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_vl_text": "Qwen2VLText",
    "qwen2_5_vl_text": "Qwen2_5_VLText",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_vl_text": "Qwen3VLText",
    "qwen3_vl_moe_text": "Qwen3VLMoeText",
    "qwen3_5_text": "Qwen3_5Text",
    "qwen3_5_moe_text": "Qwen3_5MoeText",
    "glm4v_text": "Glm4vText",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
}


@pytest.mark.parametrize("kind", TEXT_CLASSES)
def test_a_text_config_that_leaves_everything_out(kind: str) -> None:
    """It is that of the class, key by key: transformers 4 left out what is the class's own."""

    def found(text: dict[str, Any]) -> ModelConfig:
        config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}
        header = CheckpointHeader(Path("m"), "safetensors", {}, config | {"tie_word_embeddings": False})
        return family_of(header).read_config(header)

    whole = getattr(transformers, f"{TEXT_CLASSES[kind]}Config")()
    said = json.loads(whole.to_json_string(use_diff=False))
    assert replace(found({"model_type": kind}), tied_head=False) == replace(found(said), tied_head=False)
