"""GPTQ and AWQ on the embedded model at int4 in groups of 128: what they are worth on English text.

Its Q4_1 weights lie on a 4-bit grid already. Dithered by half a step, they are an ordinary float model again.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import load_model
from lowbit.loading.calibrate import calibrate, quantized_model
from lowbit.quantize.calibration import (
    CalibratedModule,
    CalibrationOptions,
    built_in_texts,
    token_sequences,
)
from lowbit.tokenization import load_tokenizer

SEQUENCES, LENGTH = 16, 512  # of calibration text
PROMPTS, PROMPT = 6, 480
HELD_OUT = ("execmodel", "types", "import", "naming", "objects")
KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
)


def encode(text: str) -> list[int]:
    return load_tokenizer(open_checkpoint("smollm2")).encode(text, add_special=False)


def held_out_text() -> str:
    """Chapters of Python's language reference without the paragraphs that calibration sees too."""
    seen = {paragraph.strip() for text in built_in_texts() for paragraph in text.split("\n\n")}
    paragraphs = [paragraph for name in HELD_OUT for paragraph in topics[name].split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() not in seen)


@pytest.fixture(scope="module")
def dithered(embedded_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as bf16 safetensors, every Linear's weights moved by up to half a step."""
    source = AutoModelForCausalLM.from_pretrained(
        embedded_path.parent, gguf_file=embedded_path.name, dtype=torch.float32
    )
    model = LlamaForCausalLM(LlamaConfig(**{key: getattr(source.config, key) for key in KEYS}))
    model.load_state_dict(source.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                blocks = module.weight.unflatten(1, (-1, 32))
                step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
                noise = torch.rand(blocks.shape, generator=generator) - 0.5
                module.weight.copy_((blocks + noise * step).flatten(1))
    folder = tmp_path_factory.mktemp("dithered")
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_calibration_at_int4_in_groups_of_128(dithered: Path) -> None:
    header = open_checkpoint(str(dithered))
    tokens = encode(held_out_text())
    prompts = [tokens[start : start + PROMPT] for start in range(0, PROMPTS * PROMPT, PROMPT)]
    sequences = token_sequences(encode, built_in_texts(), SEQUENCES, LENGTH)

    def log_probabilities(model: object) -> Tensor:
        logits = [prompt_logits(model, [prompt])[0] for prompt in prompts]  # type: ignore[arg-type]
        return torch.cat(logits).log_softmax(-1)

    wanted = log_probabilities(load_model(header, device="cpu"))
    found = {}
    for name, options in {
        "rtn": CalibrationOptions("rtn", group_size=128),
        "gptq": CalibrationOptions("gptq", group_size=128),
        "rtn with zero points": CalibrationOptions("rtn", group_size=128, symmetric=False),
        "awq": CalibrationOptions("awq", group_size=128, symmetric=False),
    }.items():
        stream = calibrate(header, sequences, options)
        got = log_probabilities(quantized_model(header, stream, device="cpu"))
        found[name] = float((wanted.exp() * (wanted - got)).sum(-1).mean())
        print(f"{name}: mean KL {found[name]:.5f}")
    assert found["gptq"] < 0.7 * found["rtn"]
    assert found["awq"] < 0.9 * found["rtn with zero points"]


@pytest.mark.slow
def test_a_gguf_file_is_walked_too(embedded_path: Path) -> None:
    """On request, quantized as it is; the first block will do."""
    header = open_checkpoint("smollm2")
    sequences = token_sequences(encode, ["The quick brown fox jumps over the lazy dog. " * 60], 2, 128)
    stream = calibrate(header, sequences, CalibrationOptions("gptq", bits=8, requantize=True))
    first = next(stream)
    assert isinstance(first, CalibratedModule)
    assert first.name == "model.layers.0.self_attn.q_proj" and first.weight.shape == (576, 576)
    source = AutoModelForCausalLM.from_pretrained(
        embedded_path.parent, gguf_file=embedded_path.name, dtype=torch.float32
    )
    weight = source.model.layers[0].self_attn.q_proj.weight.detach()
    assert (first.weight.dequantize() - weight).abs().max() < 0.05 * weight.abs().max()
