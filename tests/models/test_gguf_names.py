"""The GGUF names against what llama.cpp's converter really wrote (tests/fixtures/gguf_families)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowbit.checkpoint.gguf_file import read_gguf_header
from lowbit.models.gguf_names import (
    GEMMA_GGUF_NAMES,
    GGUF_NAMES,
    GLM4_GGUF_NAMES,
    POST_NORM_GGUF_NAMES,
    QWEN_NEXT_GGUF_NAMES,
)
from lowbit.models.registry import family_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gguf_families"
ORIGINS: dict[str, dict[str, list[str]]] = json.loads((FIXTURES / "origins.json").read_text())
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
GRANITE = {
    "block_sparse_moe.input_linear": "mlp.experts.gate_up_proj",
    "block_sparse_moe.output_linear": "mlp.experts.down_proj",
    "block_sparse_moe.router.layer": "mlp.router",
    "shared_mlp.input_linear": "mlp.shared_experts.gate_up_proj",
    "shared_mlp.output_linear": "mlp.shared_experts.down_proj",
}
PARTS = {
    "upper half": ("gate_up_proj", "gate_proj"),
    "lower half": ("gate_up_proj", "up_proj"),
    "even": ("gate_up_proj", "gate_proj"),
    "odd": ("gate_up_proj", "up_proj"),
    "K rows": ("kv_b_proj", "k_b_proj"),
    "V rows": ("kv_b_proj", "v_b_proj"),
    "q of all key heads": ("in_proj_qkvz", "in_proj_qkv"),
    "z of all key heads": ("in_proj_qkvz", "in_proj_z"),
}


def names_of(family: str) -> dict[str, str]:
    return family_of(read_gguf_header(FIXTURES / f"{family}.gguf")).gguf_names


def canonical(stored: str, source: str, change: str) -> str:
    """The canonical name of what a GGUF tensor holds, from the checkpoint's name of it."""
    if not source:
        return stored  # made by the converter
    for theirs, ours in GRANITE.items():
        source = source.replace(theirs, ours)
    name = re.sub(r"experts\.\{e\}\.", "experts.", source.replace("block_sparse_moe", "mlp"))
    name = re.sub(r"experts\.(w\d)", lambda found: f"experts.{MIXTRAL[found[1]]}", name)
    for start, (whole, part) in PARTS.items():
        if change.startswith(start):
            name = name.replace(whole, part)
    name = re.sub(r"(experts\.\w+_proj)_bias$", r"\1.bias", name)
    return re.sub(r"(experts\.\w+_proj)$", r"\1.weight", name)


@pytest.mark.parametrize("family", ORIGINS)
def test_every_tensor_has_its_converter_name(family: str) -> None:
    names = names_of(family)
    for stored, (source, change) in ORIGINS[family].items():
        name = canonical(stored, source, change)
        if name in names:  # a tensor, and no module's
            assert names[name] == stored
            continue
        stem, _, suffix = name.rpartition(".")
        assert f"{names[stem]}.{suffix}" == stored, name


@pytest.mark.parametrize("family", ORIGINS)
def test_origins_are_those_of_the_file(family: str) -> None:
    header = read_gguf_header(FIXTURES / f"{family}.gguf")
    general = {re.sub(r"^blk\.\d+\.", "blk.{n}.", name) for name in header.tensors}
    assert general == set(ORIGINS[family])


def test_which_tensors_the_converter_changes() -> None:
    """What loading must undo, and what it must not."""
    for family, origins in ORIGINS.items():
        permuted = {stored for stored, (_, change) in origins.items() if "permuted" in change}
        added = {stored for stored, (_, change) in origins.items() if change == "+ 1"}
        norms = {stored for stored in origins if stored.endswith("norm.weight")}
        pairs = family_of(read_gguf_header(FIXTURES / f"{family}.gguf")).gguf_rotates_pairs
        turned = {
            "blk.{n}.attn_q.weight",
            "blk.{n}.attn_k.weight",
            "blk.{n}.attn_q.bias",
            "blk.{n}.attn_k.bias",
        }
        assert permuted == (turned & set(origins) if pairs else set()), family
        shifted = norms if family.startswith("gemma") else set()
        shifted = norms - {"blk.{n}.ssm_norm.weight"} if family == "qwen3next" else shifted
        assert added == shifted, family


def test_stems_name_one_module_in_each_family() -> None:
    """Two canonical names of one stem are spellings of one module; no family uses both."""
    shared = {"blk.{n}.ffn_up", "blk.{n}.ffn_gate_inp"}
    shared |= {f"blk.{{n}}.ffn_{part}_shexp" for part in ("gate", "up", "down")}
    for names in (GGUF_NAMES, POST_NORM_GGUF_NAMES, GEMMA_GGUF_NAMES, GLM4_GGUF_NAMES, QWEN_NEXT_GGUF_NAMES):
        stems = list(names.values())
        in_others = {"blk.{n}.attn_qkv"} if names is QWEN_NEXT_GGUF_NAMES else set()
        assert {stem for stem in stems if stems.count(stem) > 1} == shared | in_others
