"""GPTQ and AWQ, written as GPTQModel and AutoAWQ read them. The layouts are those of ``gptq`` and ``awq``.

GPTQ: 2, 3, 4 and 8 bits. A checkpoint of symmetric modules is v1, which every tool reads. One with zero
points is v2: v1 stores zero - 1, and where a zero point is 0, as it is wherever a group's weights are all
positive, its tools disagree on what follows. Modules that differ from most have their own rule under
``dynamic``; those left alone are excluded there, and for transformers, where they are whole kinds of layers,
by ``modules_in_block_to_quantize``. AWQ: 4 bits, ``gemm``, one group size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.awq import GEMM_ORDER
from lowbit.formats.writing import CheckpointWriter, cannot, grouped_rows
from lowbit.numerics.bit_packing import pack_words
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_SCALES = ("f16", "bf16")

Json = dict[str, object]


def _refuses_integers(scheme: Scheme, shape: tuple[int, int], widths: tuple[int, ...]) -> str | None:
    """What GPTQ and AWQ have in common."""
    if scheme.activation is not None:
        return "its inputs are quantized, and this format leaves inputs alone"
    bits, name = scheme.weight.bits, scheme.weight.name
    if not scheme.weight.is_integer or bits not in widths:
        return f"codes are integers of {', '.join(map(str, widths))} bits, not {name}"
    if name.startswith("int") != (scheme.zero == "none") or scheme.zero == "float":
        return f"codes are signed, or unsigned with integer zero points; this is {scheme}"
    if (reason := grouped_rows(scheme, shape[1])) is not None:
        return reason
    if scheme.scales[0].name not in _SCALES:
        return f"scales are {' or '.join(_SCALES)}, not {scheme.scales[0].name}"
    return None


class GptqWriter(CheckpointWriter):
    """``zeros``: "v1" or "v2"; None: v1 where every module is symmetric, else v2.

    ``made``: how GPTQ was run, as far as that is known: ``static_groups``, ``act_order``, ``damp_percent``.
    The config's ``desc_act`` says something else: that columns lie in an order of their own, which
    ``static_groups`` never need; with it tools look for g_idx and take slower kernels.
    """

    name = "gptq"
    writes = "2, 3, 4, 8 bits; v1, with zero points v2; act-order; dynamic rules"
    config_files = ("quantize_config.json",)

    def __init__(self, schemes: Mapping[str, Scheme], zeros: str | None = None) -> None:
        super().__init__(schemes)
        symmetric = all(scheme.zero == "none" for scheme in self.quantized().values())
        self.zeros = zeros or ("v1" if symmetric else "v2")
        self.made: Json = {}

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks and sizes, in this order."""
        if scheme.is_dense:
            return None
        if (reason := _refuses_integers(scheme, shape, (2, 3, 4, 8))) is not None:
            return reason
        if any(size * int(scheme.weight.bits) % 32 for size in shape):
            return f"{shape[0]} rows and {shape[1]} columns of {scheme.weight.bits} bits are no whole words"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        bits, columns = int(weight.scheme.weight.bits), module.shape[1]
        codes, order = weight.codes, weight.column_order
        group_of = torch.arange(columns, dtype=torch.int32) // (weight.scheme.blocks[0][1] or columns)
        if order is not None:
            codes, stored = torch.empty_like(codes), group_of
            codes[:, order] = weight.codes
            group_of = torch.empty_like(stored)
            group_of[order] = stored
        middle = 1 << bits - 1
        zeros = torch.full_like(weight.scales[0], middle) if weight.zeros is None else weight.zeros
        fields = zeros.to(torch.int16) - int(self.zeros == "v1")
        if int(fields.min()) < 0:
            raise cannot(self.name, module, "a zero point is 0, which v1 files cannot say; v2 files can")
        return {
            "qweight": pack_words(codes.T.contiguous(), bits, dim=0),
            "qzeros": pack_words(fields.T.contiguous().to(torch.uint8), bits, dim=1),
            "scales": weight.scales[0].T,
            "g_idx": group_of,
        }

    def warning(self) -> str:
        """transformers has one rule for all Linears of the blocks, and none for the head."""
        config = self.quantization_config()
        rules = "dynamic" in config and "modules_in_block_to_quantize" not in config
        if not rules and not config["lm_head"]:
            return ""
        where = "modules with a rule of their own" if rules else "the quantized head"
        groups = {scheme.blocks[0][1] for scheme in self.quantized().values()}
        several = rules and len(groups) > 1 and 0 not in groups
        one = f"group_size={min(groups)} where groups alone differ, " if several else ""
        return (
            f"GPTQModel reads it. transformers does not heed {where} and opens the folder all the same: "
            f"after a warning it computes with random weights there, or it stops. For transformers: {one}"
            "--format compressed-tensors, where no module has zero points, or dense"
        )

    def quantization_config(self) -> dict[str, object]:
        """GPTQModel's config: the most frequent rule, and what differs."""
        rules = {name: _rule(scheme) for name, scheme in self.quantized().items()}
        ((base, _),) = Counter(tuple(rule.items()) for rule in rules.values()).most_common(1)
        common: Json = dict(base)
        dynamic: Json = {}
        other: dict[tuple[tuple[str, object], ...], list[str]] = {}
        for name, rule in rules.items():
            if rule != common:
                other.setdefault(tuple(rule.items()), []).append(name)
        for told, named in other.items():
            differs = {k: v for k, v in told if v != common[k]}
            dynamic |= {f"+:^{re.escape(name)}$": differs for name in (*named, *self.run_as_one(named))}
        inside = [name for name in self.left_alone() if not name.endswith("lm_head")]
        excluded = [*inside, *self.run_as_one(inside)]
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in excluded}
        found: Json = {
            "quant_method": "gptq",
            **common,
            "checkpoint_format": "gptq" if self.zeros == "v1" else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": any(name.endswith("lm_head") for name in rules),
            "true_sequential": True,
            "static_groups": self.made.get("static_groups") is True,  # AutoGPTQ's place; meta is GPTQModel's
        }
        if self.made:  # act_group_aware: GPTQModel's own order, which it takes to be used unless told
            found["meta"] = {**self.made, "act_group_aware": False}
        if dynamic:
            found["dynamic"] = dynamic
            kinds = _kinds(list(rules), inside)
            if kinds and not other:
                found["modules_in_block_to_quantize"] = [kinds]  # what transformers heeds instead
        return found


def _kinds(quantized: list[str], plain: list[str]) -> list[str]:
    """The quantized modules of every block by their names in it (``mlp.up_proj``), where these tell them from
    the plain ones; else none, and none where experts have names of their own."""
    names = [name for name in quantized if not name.endswith("lm_head")]
    kinds = [re.sub(r"^.*?\.\d+\.", "", name) for name in names]
    if any(kind == name or ".experts." in f".{kind}" for kind, name in zip(kinds, names, strict=True)):
        return []
    kinds = list(dict.fromkeys(kinds))
    return [] if any(name.endswith(kind) for name in plain for kind in kinds) else kinds


def _rule(scheme: Scheme) -> Json:
    return {
        "bits": int(scheme.weight.bits),
        "group_size": scheme.blocks[0][1] or -1,
        "sym": scheme.zero == "none",
        "desc_act": scheme.reordered,
    }


class AwqWriter(CheckpointWriter):
    """AutoAWQ's ``gemm``."""

    name = "awq"
    writes = "gemm, 4 bits"
    config_files = ("quant_config.json",)
    one_group = True

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        # A group as wide as its row is read as the row: such a module has no group of its own here.
        groups = {s.blocks[0][1]: name for name, s in self.quantized().items() if s.blocks[0][1]}
        if len(groups) > 1:
            told = ", ".join(f"{group} in {name}" for group, name in sorted(groups.items()))
            raise LowbitError(
                "E0450",
                f"--format awq: groups are {told}; an AWQ checkpoint has one. Use compressed-tensors, or "
                f"quantize with group_size={min(groups)}",
            )
        self.group = next(iter(groups), 0)

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks and sizes, in this order."""
        if scheme.is_dense:
            return None
        if (reason := _refuses_integers(scheme, shape, (4,))) is not None:
            return reason
        if scheme.reordered:
            return "its columns lie in another order (act-order), for which AWQ has no place"
        if shape[0] % 8 or (scheme.blocks[0][1] and shape[1] % scheme.blocks[0][1]):
            return f"{shape[0]} rows or {shape[1]} columns are no whole words or groups"
        return None

    def misfit(self, module: StoredModule) -> str | None:
        """AutoAWQ has whole groups only."""
        scheme, columns = self.schemes[module.stored], module.shape[1]
        if scheme.is_dense or not self.group or scheme.blocks[0][1] or columns == self.group:
            return None
        return f"it has one scale for its {columns} columns, other modules have groups of {self.group}"

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        zeros = torch.full_like(weight.scales[0], 8) if weight.zeros is None else weight.zeros
        return {
            "qweight": _gemm_words(weight.codes),
            "qzeros": _gemm_words(zeros.to(torch.uint8)),
            "scales": weight.scales[0].T,
        }

    def quantization_config(self) -> dict[str, object]:
        """AutoAWQ's config, under both of its spellings."""
        group, left = self.group or -1, self.left_alone()
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "w_bit": 4,
            "q_group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*left, *self.run_as_one(left)],
        }


def _gemm_words(rows: Tensor) -> Tensor:
    """uint8 (out, n) -> int32 (n, out / 8), the kernel's order in each word."""
    return pack_words(rows.T.contiguous(), 4, dim=1, order=GEMM_ORDER)


WRITERS = (GptqWriter, AwqWriter)
