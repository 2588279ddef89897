"""What Hugging Face folders call the modules of a family, and which they keep in one matrix.

The other way round than ``Family.aliases`` read them: of several spellings the one that transformers writes,
which is the first. Families whose own class transformers does not have are written as the class they amount
to (``hf_config``), under its names.
"""

from __future__ import annotations

import re

from lowbit.models.registry import Family

# Written as Llama or Granite; gpt-oss' aliases are of other tools, K-EXAONE's are names in memory.
_CANONICAL = frozenset(("internlm2", "baichuan", "minicpm", "exaone", "gpt_oss", "exaone_moe"))

_QKV, _GATE_UP = "qkv_proj", "gate_up_proj"
# In both: Q, K and V, or gate and up, one below another in GGUF.
_FUSED = {
    "phi3": frozenset((_QKV, _GATE_UP)),
    "glm": frozenset((_GATE_UP,)),
    "glm4": frozenset((_GATE_UP,)),
    "gpt2": frozenset((_QKV,)),
    "gpt_neox": frozenset((_QKV,)),
    "falcon": frozenset((_QKV,)),
}
_FUSED_IN_FOLDERS = _FUSED | {name: frozenset((_GATE_UP,)) for name in ("granitemoe", "gpt_oss")}
# Experts that lie in one tensor: its name under the layer.
_STACKS = {
    "granitemoe": {
        "gate_up_proj": "block_sparse_moe.input_linear.weight",
        "down_proj": "block_sparse_moe.output_linear.weight",
    },
    "gpt_oss": {"gate_up_proj": "mlp.experts.gate_up_proj", "down_proj": "mlp.experts.down_proj"},
}
_EXPERT = re.compile(r"(model\.layers\.\d+\.)mlp\.experts\.(\d+)\.(\w+)")


def hf_name(family: Family, canonical: str) -> str:
    """The module's name in a folder of the family."""
    if family.name in _CANONICAL:
        return canonical
    spelled = (re.sub(pattern, replacement, canonical) for pattern, replacement in family.aliases)
    return next((name for name in spelled if name != canonical), canonical)


def stacked_name(family: str, canonical: str) -> tuple[str, int] | None:
    """For a projection of an expert, where the family stacks them: the tensor's name, and which one it is."""
    found = _EXPERT.fullmatch(canonical)
    if family not in _STACKS or found is None:
        return None
    return found[1] + _STACKS[family][found[3]], int(found[2])


def fused_in_folders(family: str) -> frozenset[str]:
    """Which of ``qkv_proj`` and ``gate_up_proj`` are one matrix in Hugging Face folders."""
    return _FUSED_IN_FOLDERS.get(family, frozenset())


def fused_in_gguf(family: str) -> frozenset[str]:
    """Which of them are one matrix in GGUF files."""
    return _FUSED.get(family, frozenset())


def norms_by_heads(family: str) -> bool:
    """Whether folders have a tensor for each head where GGUF files have one of all heads' norms."""
    return family == "stablelm"


def in_turn(family: str) -> bool:
    """Whether the experts of folders have rows of gate and up in turn, plain ones as (in, out)."""
    return family == "gpt_oss"
