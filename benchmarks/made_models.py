"""Files that benchmarks need and no package ships, made once by lowbit itself and kept in its cache.

The embedded model in other GGUF types (from its own Q4_1 numbers as bfloat16) and a Llama of 1.1 billion
random weights, whose vocabulary is the embedded model's. Random weights cost the same time as trained ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.embedded import cache_directory
from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.formats import StoredModule
from lowbit.formats.gptq_writer import GptqWriter
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.quantize.integer_grid import IntegerGrid, round_to_nearest
from lowbit.quantize.recipe import Asked, fused_name

EMBEDDED = "smollm2"
EXPORT_OPENVINO = Path(__file__).parent / "rivals" / "export_openvino.py"
_SEED = 31


def folder() -> Path:
    """Where they lie."""
    made = cache_directory() / "benchmarks"
    made.mkdir(parents=True, exist_ok=True)
    return made


def float_folder(model: str) -> Path:
    """``smollm2`` or ``1b`` as a bfloat16 folder."""
    out = folder() / f"{model}-bf16"
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if model == EMBEDDED:
            convert(open_checkpoint(EMBEDDED), "dense", part, dtype="bf16")
        else:
            _write_one_billion(part)
        part.rename(out)
    return out


def gguf_file(model: str, kind: str) -> Path:
    """``smollm2`` or ``1b`` as a GGUF file of one of llama.cpp's mixes ("q4_0", "q4_k_m", …) or "bf16"."""
    if model == EMBEDDED and kind == "q4_1":
        return open_checkpoint(EMBEDDED).root
    out = folder() / f"{model}-{kind}.gguf"
    if not out.exists():
        header = open_checkpoint(str(float_folder(model)))
        part = out.with_name(f"{out.stem}.part.gguf")
        part.unlink(missing_ok=True)
        if kind == "bf16":
            convert(header, "gguf", part)
        else:
            load_model(header, quantization=Asked("gguf", gguf_type=kind), save=part)
        part.rename(out)
    return out


def _write_one_billion(out: Path) -> None:
    """Hidden 2048, 16 layers, 32 heads, 8 of K and V, 8192 inside; tied embedding, as the 1B Llama has it."""
    source = float_folder(EMBEDDED)
    out.mkdir(parents=True)
    hidden, layers, inner, heads, kv_heads = 2048, 16, 8192, 32, 8
    config = json.loads((source / "config.json").read_text())
    vocabulary = config["vocab_size"]
    config |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "tie_word_embeddings": True,
    }  # fmt: skip
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(_SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).bfloat16()

    kv = hidden // heads * kv_heads
    shapes = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (kv, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    ones = torch.ones(hidden).bfloat16()
    tensors = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": ones}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones.clone()
        for name, (rows, columns) in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = matrix(rows, columns)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


SIZES = {  # hidden, layers, inner, heads, heads of K and V
    "1b": (2048, 16, 8192, 32, 8),
    "8b": (4096, 32, 14336, 32, 8),
    "tiny": (256, 2, 512, 4, 2),
}


def random_four_bit(model: str) -> Path:
    """A Llama of random 4-bit weights in groups of 128 (compressed-tensors), head and embedding in bfloat16.

    Random words are made in seconds where quantizing 8 billion weights would take minutes.
    """
    out = folder() / f"{model}-random-w4a16-g128"
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        _write_random_four_bit(part, *SIZES[model])
        part.rename(out)
    return out


def _write_random_four_bit(
    out: Path, hidden: int, layers: int, inner: int, heads: int, kv_heads: int
) -> None:
    vocabulary, group = 32000, 128
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "vocab_size": vocabulary, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(_SEED)
    kv = hidden // heads * kv_heads
    shapes = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (kv, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    plain = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5).bfloat16()
    ones = torch.ones(hidden).bfloat16()
    tensors = {"model.embed_tokens.weight": plain, "lm_head.weight": plain.clone(), "model.norm.weight": ones}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones.clone()
        for name, (rows, columns) in shapes.items():
            words = torch.randint(-(1 << 31), 1 << 31, (rows, columns // 8), generator=generator).int()
            scale = torch.full((rows, columns // group), columns**-0.5 / 4.6).bfloat16()  # codes' deviation
            tensors |= {
                f"{prefix}.{name}.weight_packed": words,
                f"{prefix}.{name}.weight_scale": scale,
                f"{prefix}.{name}.weight_shape": torch.tensor([rows, columns]),
            }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def openvino_folder(model: str, kind: str, python: str) -> Path:
    """The model as OpenVINO's files, made by its own reader and tool in ``python``.

    ``kind``: "int4-g64", 4-bit in groups of 64; "gguf-q4_1", what its reader makes of that GGUF type.
    """
    out = folder() / f"{model}-openvino-{kind}"
    what, _, detail = kind.partition("-")
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        source = gguf_file(model, detail if what == "gguf" else "f16")
        words = [python, str(EXPORT_OPENVINO), str(source), str(part)]
        words += [] if what == "gguf" else [detail.removeprefix("g")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[1:2])} failed: {done.stderr[-500:]}")
        part.rename(out)
    return out


def four_bit_folder(model: str) -> Path:
    """The model with symmetric 4-bit weights in groups of 32, as a folder other engines read."""
    out = folder() / f"{model}-w4a16-g32"
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        asked = Asked("rtn:bits=4,symmetric=true,group_size=32")
        load_model(open_checkpoint(str(float_folder(model))), quantization=asked, save=part)
        part.rename(out)
    return out


def act_order_folder(model: str, group: int) -> Path:
    """The model as a GPTQ folder of 4 bits whose columns are in groups by an order of their own (g_idx).

    GPTQ would find the order, the same for all weights of one input, by calibration, which takes minutes for
    the larger model; here it is random, and weights are rounded to nearest. It takes the same time to serve.
    """
    out = folder() / f"{model}-act-order-g{group}"
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        _write_act_order(float_folder(model), part, group)
        part.rename(out)
    return out


def _write_act_order(source: Path, out: Path, group: int) -> None:
    generator, grid = torch.Generator().manual_seed(_SEED), IntegerGrid(4, symmetric=True)
    tensors = load_file(source / "model.safetensors")
    orders: dict[str, torch.Tensor] = {}
    made: dict[str, QuantizedTensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, module = tensors.pop(name).float(), name.removesuffix(".weight")
        inputs = fused_name(module)
        if inputs not in orders:
            orders[inputs] = torch.randperm(weight.shape[1], generator=generator)
        rounded = round_to_nearest(weight[:, orders[inputs]], grid, group)
        scheme = replace(rounded.scheme, reordered=True)
        made[module] = replace(rounded, scheme=scheme, column_order=orders[inputs])
    writer = GptqWriter({module: rounded.scheme for module, rounded in made.items()})
    for module, rounded in made.items():
        out_features, in_features = rounded.shape
        tensors |= writer.write(StoredModule(module, module, (out_features, in_features)), rounded)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != CERTIFICATE:
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = writer.quantization_config()
    (out / "config.json").write_text(json.dumps(config))
