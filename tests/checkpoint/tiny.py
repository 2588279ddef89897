"""Tiny checkpoints of the Llama family that load, and the pieces to damage them with."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gguf_writing import GgufTensor, write_gguf

HIDDEN, INNER, HEADS, LAYERS, VOCABULARY = 64, 96, 2, 1, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    layer = "model.layers.0."
    square = (HIDDEN, HIDDEN)
    return {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **{f"{layer}self_attn.{name}_proj.weight": square for name in "qkvo"},
        f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }


def tensors() -> dict[str, np.ndarray]:
    """Random weights, the same each time."""
    rng = np.random.default_rng(4)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes().items()}


def write_folder(folder: Path, shards: int = 1) -> Path:
    """A Hugging Face folder of one file, or of several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = tensors()
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in list(weights)[number::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """(header object, payload)."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: object, payload: bytes, text: bytes | None = None) -> bytes:
    """The file again; ``text`` in place of the header's JSON."""
    encoded = json.dumps(header).encode() if text is None else text
    return struct.pack("<Q", len(encoded)) + encoded + payload


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    **{
        f"model.layers.0.self_attn.{name}_proj": f"blk.0.attn_{stored}"
        for name, stored in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    },
    **{f"model.layers.0.mlp.{name}_proj": f"blk.0.ffn_{name}" for name in ("gate", "up", "down")},
}
METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCABULARY)],
    "tokenizer.ggml.token_type": [1] * VOCABULARY,
    "tokenizer.ggml.add_bos_token": False,
}


def gguf_tensors() -> list[GgufTensor]:
    """The same weights: matrices of 32-wide rows as Q8_0 where they fit, norms as F32."""
    made = []
    for name, values in tensors().items():
        stored = GGUF_NAMES[name.removesuffix(".weight")] + ".weight"
        if values.ndim == 1:
            made.append(GgufTensor(stored, "F32", values.shape, values.tobytes()))
            continue
        blocks = values.reshape(-1, 32)
        scales = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        codes = np.round(blocks / np.maximum(scales.astype(np.float32), 1e-8)).astype(np.int8)
        raw = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], 1)
        made.append(GgufTensor(stored, "Q8_0", values.shape, raw.tobytes()))
    return made


def write_gguf_file(path: Path) -> Path:
    """A GGUF model of one file."""
    write_gguf(path, METADATA, gguf_tensors())
    return path
