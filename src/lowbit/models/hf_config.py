"""config.json of a model that came as GGUF: what transformers would have written for it.

The other way round than ``families``: the same keys, from the sizes and constants read from the metadata.
What GGUF files leave out (formats of the fixtures' README) is the family's knowledge, as when reading: no
sliding window for Mistral, renormalized experts. Llama 3's frequency divisors, a tensor in GGUF, are put
back into the four numbers they were made from. Of models that also see pictures it is the language model
alone (the pictures' part is a file of its own). BitNet's file does not say how inputs are quantized: the
folder leaves them alone, as what reads the file does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling, rotary_frequencies
from lowbit.models.config import ModelConfig
from lowbit.models.config_keys import architecture_of, gguf_keys
from lowbit.models.hf_families import FAMILIES, WITHOUT, Json, shortest
from lowbit.models.rope_scaling import stated_context

ReadTensor = Callable[[str], Tensor]

# Wavelengths up to original / _HIGH stay, from original / _LOW on are stretched: in all models of Meta's.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def hf_config(header: CheckpointHeader, config: ModelConfig, read: ReadTensor) -> Json:
    """The whole config.json; ``read`` gives a tensor of the file by its stored name."""
    name = architecture_of(header)
    family = FAMILIES.get("mixtral" if name == "llama" and config.moe is not None else name)
    if family is None:
        raise LowbitError(
            "E0450",
            f"{header.root.name}: GGUF files of {printable(name)!r} are not turned into Hugging Face "
            f"folders: those of {', '.join(sorted(FAMILIES))} are. Convert the original model instead",
        )
    values = _common(header, config)
    for key in WITHOUT.get(name, ()):
        del values[key]
    values |= family(header, config)
    scaling = _rope_scaling(header, config, read)
    by_layer = values.get("rope_parameters")
    if isinstance(by_layer, dict):
        by_layer["full_attention"] |= scaling  # transformers 4 reads the other spelling
    return values | ({"rope_scaling": scaling} if scaling else {})


def _common(header: CheckpointHeader, config: ModelConfig) -> Json:
    values: Json = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": stated_context(
            config.rope_scaling, config.context_length, config.architecture
        ),
        "rms_norm_eps": shortest(config.norm_eps),
        "rope_theta": shortest(config.rope_theta),
        "hidden_act": config.activation,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied_head,
        "pad_token_id": None,  # some classes default to one beyond a small vocabulary
    }
    for key in ("bos", "eos", "padding"):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < config.vocab_size:
            values[f"{'pad' if key == 'padding' else key}_token_id"] = number
    return values


def _rope_scaling(header: CheckpointHeader, config: ModelConfig, read: ReadTensor) -> Json:
    scaling = config.rope_scaling
    match scaling.kind:
        case "none":
            return {}
        case "linear":
            return {"rope_type": "linear", "factor": shortest(scaling.factor)}
        case "yarn":
            found: Json = {
                "rope_type": "yarn",
                "factor": shortest(scaling.factor),
                "original_max_position_embeddings": scaling.original_context,
                "beta_fast": shortest(scaling.beta_fast),
                "beta_slow": shortest(scaling.beta_slow),
            }
            if scaling.mscale_all_dim:  # 0.1 times it is in the file, as float32
                mscale = float(f"{10 * shortest(0.1 * scaling.mscale_all_dim):.7g}")
                found |= {"mscale": mscale, "mscale_all_dim": mscale}
            growth = gguf_keys(header).optional("attention.temperature_scale")  # of Ministral 3's queries
            if growth:
                found["llama_4_scaling_beta"] = shortest(growth)
            if not scaling.truncate:
                found["truncate"] = False
            factor = scaling.attention_factor
            return found if factor is None else found | {"attention_factor": shortest(factor)}
    if scaling.tensor == "rope_freqs.weight":
        return _llama3_scaling(header, config, read(scaling.tensor).float())
    found = {"rope_type": "longrope"}
    for length in ("long", "short"):
        factors = read(f"rope_factors_{length}.weight").tolist()
        found[f"{length}_factor"] = [shortest(factor) for factor in factors]
    if scaling.attention_factor is not None:
        found["attention_factor"] = shortest(scaling.attention_factor)
    return found


def _llama3_scaling(header: CheckpointHeader, config: ModelConfig, divisors: Tensor) -> Json:
    """The llama3 rule whose divisors these are.

    Between the two wavelengths 1 / divisor = (1 - share) / factor + share, with share growing from 0 to 1 as
    original / wavelength does from _LOW to _HIGH: one such divisor tells the original context.
    """
    plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling())
    factor, original = shortest(float(divisors.max())), _ORIGINAL
    between = ((divisors > 1) & (divisors < factor)).nonzero().flatten()
    if between.numel() and math.isfinite(factor):
        one = int(between[len(between) // 2])
        share = (1 / float(divisors[one]) - 1 / factor) / (1 - 1 / factor)
        original = round(2 * math.pi / float(plain[one]) * (_LOW + share * (_HIGH - _LOW)))
    scaling = RopeScaling("llama3", factor, original, _LOW, _HIGH)
    scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, scaling)
    if torch.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
    raise LowbitError(
        "E0450",
        f"{header.root.name}: 'rope_freqs.weight' divides the frequencies by up to {factor:g}, not in the "
        "way Llama 3 does; no config.json can say this. Convert the original model instead",
    )
