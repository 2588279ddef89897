"""GGUF tensor types: id, name, weights in a block, bytes of a block (ggml's). No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """``weights`` elements along *in* take ``bytes`` bytes. Plain numbers are blocks of one."""

    id: int
    name: str
    weights: int
    bytes: int


GGUF_TYPES: dict[int, GgufType] = {
    entry.id: entry
    for entry in (
        GgufType(0, "F32", 1, 4),
        GgufType(1, "F16", 1, 2),
        GgufType(2, "Q4_0", 32, 18),
        GgufType(3, "Q4_1", 32, 20),
        GgufType(6, "Q5_0", 32, 22),
        GgufType(7, "Q5_1", 32, 24),
        GgufType(8, "Q8_0", 32, 34),
        GgufType(10, "Q2_K", 256, 84),
        GgufType(11, "Q3_K", 256, 110),
        GgufType(12, "Q4_K", 256, 144),
        GgufType(13, "Q5_K", 256, 176),
        GgufType(14, "Q6_K", 256, 210),
        GgufType(16, "IQ2_XXS", 256, 66),
        GgufType(17, "IQ2_XS", 256, 74),
        GgufType(18, "IQ3_XXS", 256, 98),
        GgufType(19, "IQ1_S", 256, 50),
        GgufType(20, "IQ4_NL", 32, 18),
        GgufType(21, "IQ3_S", 256, 110),
        GgufType(22, "IQ2_S", 256, 82),
        GgufType(23, "IQ4_XS", 256, 136),
        GgufType(24, "I8", 1, 1),
        GgufType(25, "I16", 1, 2),
        GgufType(26, "I32", 1, 4),
        GgufType(27, "I64", 1, 8),
        GgufType(28, "F64", 1, 8),
        GgufType(29, "IQ1_M", 256, 56),
        GgufType(30, "BF16", 1, 2),
        GgufType(34, "TQ1_0", 256, 54),
        GgufType(35, "TQ2_0", 256, 66),
        GgufType(39, "MXFP4", 32, 17),
        GgufType(40, "NVFP4", 64, 36),
        GgufType(41, "Q1_0", 128, 18),
    )
}
GGUF_TYPES_BY_NAME = {entry.name: entry for entry in GGUF_TYPES.values()}

# Ids that exist elsewhere and why they are refused.
REFUSED_TYPES: dict[int, str] = {
    **dict.fromkeys((4, 5), "a type removed from GGUF in 2023; quantize the model again"),
    **dict.fromkeys((9, 15), "a type for activations, never of weights; the file is damaged"),
    **dict.fromkeys((31, 32, 33), "a repacked type removed from GGUF; use the Q4_0 file"),
    36: "IQ4_NL_4_4, removed from GGUF, or I2_S of bitnet.cpp; use an IQ4_NL or TQ2_0 file",
    **dict.fromkeys((37, 38), "a repacked type removed from GGUF; use the IQ4_NL file"),
    42: "Q2_0, which is written in two layouts (64 or 128 weights a block); use another file of the model",
}


def refusal(type_id: int) -> str:
    """Why tensors of a type that is not in ``GGUF_TYPES`` are refused."""
    if 97 <= type_id < 512:
        return "a type of the ik_llama.cpp fork"
    return REFUSED_TYPES.get(type_id, "an id lowbit does not know")
