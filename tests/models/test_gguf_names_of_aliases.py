"""What families' own tensor names become in GGUF, against the table of the gguf package."""

from __future__ import annotations

import re

import gguf
import pytest

from lowbit.models.families import exaone_moe, gemma, glm, llama_relatives, minimax, plain_mlp
from lowbit.models.registry import Family

FAMILIES = [
    (llama_relatives.EXAONE, "EXAONE"),
    (llama_relatives.EXAONE4, "EXAONE4"),
    (llama_relatives.MINICPM, "MINICPM"),
    (llama_relatives.INTERNLM2, "INTERNLM2"),
    (llama_relatives.BAICHUAN, "BAICHUAN"),
    (llama_relatives.BITNET, "BITNET"),
    (plain_mlp.STARCODER2, "STARCODER2"),
    (plain_mlp.PHI, "PHI2"),
    (plain_mlp.FALCON, "FALCON"),
    (plain_mlp.GPT_NEOX, "GPTNEOX"),
    (plain_mlp.GPT2, "GPT2"),
    (plain_mlp.ARCEE, "ARCEE"),
    (plain_mlp.NEMOTRON, "NEMOTRON"),
    (gemma.GEMMA, "GEMMA"),
    (llama_relatives.SEED_OSS, "SEED_OSS"),
    (llama_relatives.ERNIE, "ERNIE4_5"),
    (llama_relatives.HUNYUAN, "HUNYUAN_DENSE"),
    (llama_relatives.HUNYUAN_MOE, "HUNYUAN_MOE"),
    (glm.DOTS1, "DOTS1"),
    (minimax.MINIMAX_M2, "MINIMAXM2"),
    (exaone_moe.EXAONE_MOE, "EXAONE_MOE"),
]


BITNET_NORMS = {
    "model.layers.3.self_attn.attn_sub_norm": "blk.3.attn_sub_norm",
    "model.layers.3.mlp.ffn_sub_norm": "blk.3.ffn_sub_norm",
}


def spellings(family: Family, canonical: str) -> list[str]:
    """The canonical name, and the family's own for it."""
    name = canonical.format(n=3)
    return [name, *(re.sub(old, new, name) for old, new in family.aliases if re.search(old, name))]


@pytest.mark.parametrize(("family", "arch"), FAMILIES, ids=[arch for _, arch in FAMILIES])
def test_names(family: Family, arch: str) -> None:
    known = gguf.TensorNameMap(known_arch(arch), 4)
    found = set()
    for canonical, stem in family.gguf_names.items():
        names = spellings(family, canonical)
        for name in names[1:] or names:
            stored = known.get_name(name)
            if stored is not None:
                assert stored == stem.format(n=3), name
                found.add(stored)
    wanted = {gguf.TENSOR_NAMES[tensor].format(bid=3) for tensor in gguf.MODEL_TENSORS[known_arch(arch)]}
    # Q, K and V that the converter takes out of one matrix, and what no model has.
    allowed = {f"blk.3.attn_{part}" for part in ("q", "k", "v", "qkv", "rot_embd")}
    allowed |= {"rope_freqs", "rope_factors_long", "rope_factors_short"}
    # Of BitNet's norms the table may have the first checkpoints' names only.
    allowed |= {stem for name, stem in BITNET_NORMS.items() if known.get_name(name) is None}
    assert wanted - found <= allowed | {
        stem for stem in wanted if any(part in stem for part in ("exps", "gate_inp", "exp_probs", "nextn"))
    }


def known_arch(name: str) -> gguf.MODEL_ARCH:
    arch: gguf.MODEL_ARCH = getattr(gguf.MODEL_ARCH, name)
    return arch
