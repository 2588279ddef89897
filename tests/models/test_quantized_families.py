"""Quantized checkpoints of families with names, row orders and layouts of their own: saved and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from forward_helpers import prompt_logits
from loading.test_quantizing import own_cache, with_tokenizer  # noqa: F401  (a fixture)
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.loading import load_model
from lowbit.models.decoder import Decoder
from models.family_cases import SIZES, saved, write_checkpoint
from models.test_llama_relatives import RENAMED, llama
from models.test_plain_mlp_families import CASES as PLAIN_MLP
from models.test_vision_checkpoints import make as make_vision

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
FAMILIES = [
    "InternLM 2 with biases",
    "Baichuan",
    "BitNet",
    "Exaone4",
    "Falcon 40B",
    "GPTNeoX",
    "GPT2",
    "Qwen2VL",
    "HunYuanDenseV1",
    "Nemotron",
]
PROMPT = list(range(3, 60))


def make(family: str, folder: Path) -> CheckpointHeader:
    """A float checkpoint, the smaller families' layers wide enough for every method."""
    if family in RENAMED:
        mapping, values = RENAMED[family]
        write_checkpoint(folder, *mapping(llama(**WIDE | values)))
    elif family == "Qwen2VL":
        make_vision(family, folder)
    elif family == "GPT2":
        saved("GPT2", folder, **PLAIN_MLP["GPT2"] | {"n_embd": 128, "n_layer": 2})
    else:
        wide = {
            key: value for key, value in WIDE.items() if "Falcon" not in family or key != "intermediate_size"
        }
        wide |= {"head_dim": 32} if family == "HunYuanDenseV1" else {}
        saved(family.split()[0], folder, **PLAIN_MLP.get(family, SIZES) | wide)
    return open_checkpoint(str(folder))


def load(header: CheckpointHeader, **options: Any) -> Decoder:
    """K and V in bfloat16, as those of a quantized checkpoint, also of a float32 one."""
    model = load_model(header, device="cpu", kv_cache_dtype="bf16", **options)
    assert isinstance(model, Decoder)
    return model


def logits(header: CheckpointHeader, **options: Any) -> torch.Tensor:
    return prompt_logits(load(header, **options), [PROMPT])[0]


def is_near(found: torch.Tensor, header: CheckpointHeader, share: float) -> bool:
    """Whether the mean error is that share of the float model's logits, and there is one."""
    wanted = logits(header)
    return bool(0 < (found - wanted).abs().mean() < share * wanted.abs().mean())


@pytest.mark.parametrize("method", ["int8:group_size=32", "nf4", "fp8:weights=block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_is_served(family: str, method: str, tmp_path: Path) -> None:
    header = make(family, tmp_path / "float")
    served, loaded = (
        load(header, quantization=method),
        load(header, quantization=method, save=tmp_path / "saved"),
    )
    found = prompt_logits(loaded, [PROMPT])[0]
    assert is_near(found, header, {"nf4": 0.7, "fp8:weights=block": 0.35}.get(method, 0.1))
    # Blocks of rows that change places are other blocks.
    if loaded.blocks[0].qkv.order is None:
        assert torch.equal(prompt_logits(served, [PROMPT])[0], found)
    else:
        assert method == "fp8:weights=block"


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "gptq:bits=8") for family in ("InternLM 2 with biases", "Falcon 40B", "GPT2", "Exaone4")),
        *(pytest.param(family, "awq", marks=pytest.mark.slow) for family in ("BitNet", "GPT2")),
    ],
)
def test_calibrated(family: str, method: str, tmp_path: Path) -> None:
    """What is calibrated is written in the checkpoint's order of rows."""
    header = make(family, tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    form = ":" if ":" not in method else ","
    found = logits(header, quantization=f"{method}{form}sequences=2,length=32,group_size=32")
    assert is_near(found, header, 0.1 if "8" in method else 0.7)


def test_rows_that_share_scales_stay(tmp_path: Path) -> None:
    """Of a fused QKV in groups the outputs change places instead."""
    header = make("GPTNeoX", tmp_path / "float")
    model = load(header, quantization="fp8:weights=block", save=tmp_path / "saved")
    assert model.blocks[0].qkv.order is not None and load(header).blocks[0].qkv.order is None


IGNORED = {
    "GPT2": "transformer.h.0.attn.c_attn",
    "Qwen2VL": "model.layers.0.self_attn.o_proj",
    "InternLM 2 with biases": "model.layers.0.attention.wo",
}


@pytest.mark.parametrize("family", IGNORED)
def test_ignore_lists_name_modules_as_they_are_stored(family: str, tmp_path: Path) -> None:
    """One module of a quantized checkpoint put back as it was, and named in the config."""
    module, out = IGNORED[family], tmp_path / "saved"
    header = make(family, tmp_path / "float")
    load(header, quantization="fp8", save=out)
    plain = load_file(tmp_path / "float" / "model.safetensors")[f"{module}.weight"]
    tensors = load_file(out / "model.safetensors")
    dequantized = tensors[f"{module}.weight"].float() * tensors.pop(f"{module}.weight_scale")
    turned = plain.T if family == "GPT2" else plain
    assert (dequantized - turned).abs().max() < 0.1 * turned.abs().max()
    tensors[f"{module}.weight"] = plain
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] += [module, "re:visual.*"]
    (out / "config.json").write_text(json.dumps(config))
    block = load(open_checkpoint(str(out)), strict=True).blocks[0]
    kept = block.qkv if family == "GPT2" else block.output
    assert kept.weights[0].scheme.is_dense and not block.mlp.down.weights[0].scheme.is_dense  # type: ignore[union-attr]
