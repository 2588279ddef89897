"""Where a model's modules lie in a checkpoint: prefixes, families' other spellings, fused and stacked forms.

A model asks under canonical names (Hugging Face's for its class). A checkpoint may say
``model.language_model.layers.0…``, keep q, k and v in one ``qkv_proj``, store experts one by one or stacked,
call them ``block_sparse_moe.experts.3.w1``, or be a GGUF file with names of its own.

gpt-oss' gate and up rows come in turn wherever a tool kept them in one matrix: stacked (OpenAI, ModelOpt), or
an expert at a time (unsloth's ``experts.gate_up_projs.3``, GPTQModel's ``experts.gate_up.3``); AutoRound and
llm-compressor take them apart into ``experts.3.gate_proj`` and ``up_proj``, mlx-lm into stacks of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.formats import StoredModule
from lowbit.layers.cuts import Cut
from lowbit.layers.experts import ExpertsSpec
from lowbit.layers.linear import Part
from lowbit.models.registry import Family

_PREDICTION = re.compile(r"(model\.)?mtp\.")  # as Qwen3-Next calls what others number as further layers
_PREFIXES = (
    *("model.", "model.language_model.", "language_model.model.", "language_model.", "model.text_model."),
    "",
)
# Where one expert's projection may lie by itself; w1, w2, w3: Mixtral's first spelling.
_SINGLE = {
    "gate_proj": ("{n}.gate_proj", "{n}.w1"),
    "up_proj": ("{n}.up_proj", "{n}.w3"),
    "down_proj": ("{n}.down_proj", "{n}.w2", "down_projs.{n}", "down.{n}"),
    "gate_up_proj": ("{n}.gate_up_proj", "gate_up_projs.{n}", "gate_up.{n}"),
}
# A stack of all experts: ``experts.down_proj``, ``experts.down_proj_scale``; as mlx-lm has it
# ``switch_mlp.down_proj.weight`` and for gpt-oss ``experts.down_proj.weight``.
_STACKED = re.compile(
    r"(.+\.(?:experts|switch_mlp)\.(?:gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13)"
    r"|.+\.block_sparse_moe\.(?:input|output)_linear\.weight)"
    r"(?:_\w+|\.(?:weight|scales|biases|bias|global_scale))?$"
)
# torchao's parts of one: ``experts._down_proj_qdata``.
_STACKED_PARTS = re.compile(r"(.+\.experts)\._(gate_up_proj|gate_proj|up_proj|down_proj)_qdata$")
# Other names of stacked projections; GraniteMoE's are modules and end in .weight.
_STACKS = {
    "gate_up_proj": ("w13", "input_linear.weight"),
    "gate_proj": ("w1",),
    "up_proj": ("w3",),
    "down_proj": ("w2", "output_linear.weight"),
}


@dataclass(frozen=True)
class Placed:
    """A part and where it is stored. ``interleaved``: gate and up rows come in turn; ``swapped``: up rows
    come first.

    ``groups``, ``group_rows``: as of ``Part``; of Q, K and V in one module a group is some query heads with
    their K and V head. ``rows``: (first row, cut) of each run of rows that ranks share, none: all are here.
    ``columns``: which stored columns are here; ``inputs``: where the layer's inputs are, if not just there.
    ``product``: which stored rows are multiplied here, whose products ranks gather to transform them; of the
    results ``rows`` are wanted. ``whole``: in words, how ranks share experts that are not cut; ``elsewhere``:
    another rank has this one.
    """

    part: Part
    module: StoredModule
    rotary_heads: int = 0
    interleaved: bool = False
    swapped: bool = False
    groups: int = 0
    group_rows: tuple[int, ...] = ()
    rows: tuple[tuple[int, Cut], ...] = ()
    columns: Cut | None = None
    inputs: Cut | None = None
    product: Cut | None = None
    whole: str = ""
    elsewhere: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of what is here."""
        columns = self.part.shape[1] if self.columns is None else self.columns.size
        return self.outputs if self.product is None else self.product.size, columns

    @property
    def outputs(self) -> int:
        """How many of its results are wanted here."""
        return sum(cut.size for _, cut in self.rows) or self.part.shape[0]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The rows that are here, in the model's order."""
        return [(first + cut.start, first + cut.stop) for first, cut in self.rows]

    @property
    def wanted_rows(self) -> Tensor:
        """int64: which of the model's rows are here, in the order they are wanted in."""
        if not self.rows:
            return torch.arange(self.part.shape[0])
        return torch.cat(
            [
                first + (torch.arange(cut.start, cut.stop) if cut.order is None else cut.order)
                for first, cut in self.rows
            ]
        )

    @property
    def picked_rows(self) -> Tensor | None:
        """The same, where they are not just ``runs``."""
        return None if all(cut.order is None for _, cut in self.rows) else self.wanted_rows


class Names:
    """The tensors of a checkpoint under the model's names; remembers which were used.

    ``tied``: embedding and head are one matrix, which may be stored as either.
    """

    def __init__(
        self,
        header: CheckpointHeader,
        family: Family,
        layers: int,
        unused: Iterable[str] = (),
        tied: bool = False,
    ) -> None:
        self.tied = tied
        self.header = header
        self.family = family
        self.layers = layers
        self.unused = tuple(unused)
        self.used: set[str] = set()
        self.in_gguf = header.container == "gguf"
        self.modules = {name.rpartition(".")[0] for name in header.tensors}
        self.stacks = {match[1] for name in header.tensors if (match := _STACKED.match(name))}
        parts = map(_STACKED_PARTS.match, header.tensors)
        self.stacks |= {f"{match[1]}.{match[2]}" for match in parts if match}
        found = (prefix for prefix in _PREFIXES if f"{prefix}embed_tokens" in self.modules)
        self.prefix = "model." if self.in_gguf else next(found, "model.")

    def place(self, name: str, parts: list[Part]) -> list[Placed]:
        """Where the parts of layer ``name`` are stored: each by itself, or all in one fused module."""
        stems = [self._stem(part.name) for part in parts]
        if len(parts) > 1 and not all(stem in self.modules for stem in stems):
            fused, swapped = self._stem(name, missing_ok=True), False
            if fused not in self.modules and name.endswith(".gate_up_proj"):
                fused, swapped = (
                    self._stem(name.replace("gate_up_proj", "upgate_proj"), missing_ok=True),
                    True,
                )
            if fused in self.modules:
                if self.in_gguf and self.family.gguf_rotates_pairs and parts[0].rotary_heads:
                    raise LowbitError(
                        "E0241",
                        f"{self.header.root.name}: {fused!r} holds Q, K and V in one tensor, which files "
                        f"of {self.family.name} keep apart; in which order its rows turn is not known",
                    )
                if any(part.groups for part in parts):
                    raise LowbitError(
                        "E0241",
                        f"{self.header.root.name}: {fused!r} holds in one tensor what checkpoints of "
                        f"{self.family.name} keep apart; in which order its rows lie is not known",
                    )
                rows = sum(part.shape[0] for part in parts)
                part = Part(name, (rows, parts[0].shape[1]), bias=parts[0].bias)
                module = self._module(name, fused, part.shape)
                if self.family.grouped_qkv and not self.in_gguf and name.endswith(".qkv_proj"):
                    heads, kv_heads = parts[0].rotary_heads, parts[1].rotary_heads
                    head = rows // (heads + 2 * kv_heads)
                    return [
                        Placed(
                            part, module, groups=kv_heads, group_rows=(heads // kv_heads * head, head, head)
                        )
                    ]
                return [Placed(part, module, swapped=swapped)]
        rotates = self.header.rotary_pairs or (self.in_gguf and self.family.gguf_rotates_pairs)
        return [
            Placed(
                part,
                self._module(part.name, stem, part.shape),
                part.rotary_heads if rotates else 0,
                groups=part.groups,
                group_rows=part.group_rows,
            )
            for part, stem in zip(parts, stems, strict=True)
        ]

    def _module(self, name: str, stem: str, shape: tuple[int, int]) -> StoredModule:
        """A plain matrix inside the blocks lies as (in, out) where the family's layers are GPT-2's Conv1D."""
        turned = self.family.transposed and not self.in_gguf and ".layers." in name
        entry = self.header.tensors.get(f"{stem}.weight") if turned else None
        plain = entry is not None and entry.dtype in ("F64", "F32", "F16", "BF16")
        return StoredModule(name, stem, shape, transposed=plain)

    def expert(self, name: str, spec: ExpertsSpec, number: int) -> tuple[list[Placed], list[Placed]]:
        """Where one expert's gate and up, and its down projection are stored."""
        gate_up = {"gate_proj": spec.intermediate, "up_proj": spec.intermediate}
        column = {"gate_proj": spec.hidden, "up_proj": spec.hidden, "down_proj": spec.intermediate}
        shapes = {leaf: (rows, column[leaf]) for leaf, rows in (gate_up | {"down_proj": spec.hidden}).items()}

        def stacked(leaf: str, stem: str, shape: tuple[int, int], interleaved: bool = False) -> Placed:
            part = Part(f"{name}.{number}.{leaf}", shape, bias=spec.bias)
            dotted = f"{stem}.weight" in self.header.tensors and not self.in_gguf
            transposed = spec.transposed and not dotted
            module = StoredModule(part.name, stem, shape, number, spec.count, transposed, dotted)
            return Placed(part, module, interleaved=interleaved)

        style, base = self._expert_style(name)
        if style == "each":

            def single(leaf: str, shape: tuple[int, int], interleaved: bool = False) -> Placed:
                part = Part(f"{name}.{number}.{leaf}", shape, bias=spec.bias)
                stem = self._single_stem(base, leaf, number)
                return Placed(part, StoredModule(part.name, stem, shape), interleaved=interleaved)

            down = [single("down_proj", shapes["down_proj"])]
            if all(self._single_stem(base, leaf, number) not in self.modules for leaf in gate_up):
                fused = single("gate_up_proj", (2 * spec.intermediate, spec.hidden), spec.interleaved)
                if fused.module.stored in self.modules:
                    return [fused], down
            return [single(leaf, shapes[leaf]) for leaf in gate_up], down
        stems = {leaf: self._stacked_stem(name, base, leaf) for leaf in ("gate_up_proj", *shapes)}
        down = [stacked("down_proj", stems["down_proj"], shapes["down_proj"])]
        if style == "fused":
            shape = (2 * spec.intermediate, spec.hidden)
            interleaved = spec.interleaved and not self.in_gguf
            return [stacked("gate_up_proj", stems["gate_up_proj"], shape, interleaved)], down
        return [stacked(leaf, stems[leaf], shapes[leaf]) for leaf in gate_up], down

    def _expert_style(self, name: str) -> tuple[str, str]:
        """("each" | "stacked" | "fused", the stored name of the experts)."""
        if self.in_gguf:
            base = name.removesuffix(".experts")
            if self._single_stem(base, "gate_proj", 0) in self.modules:
                return "each", base
            fused = self._stacked_stem(name, base, "gate_up_proj")
            return ("fused" if fused in self.modules else "stacked"), base
        bases = [self._stem(name, missing_ok=True)]
        bases += [base for base in self._candidates(name) if base not in bases]
        bases += [f"{base.removesuffix('experts')}switch_mlp" for base in bases]
        for base in bases:
            # First: transformers stacks the scales, and nothing else, of experts it saves one by one.
            if any(
                self._single_stem(base, leaf, 0) in self.modules for leaf in ("gate_proj", "gate_up_proj")
            ):
                return "each", base
            if self._stacked_stem(name, base, "gate_up_proj") in self.stacks:
                return "fused", base
            if self._stacked_stem(name, base, "gate_proj") in self.stacks:
                return "stacked", base
        return "each", bases[0]

    def _single_stem(self, base: str, leaf: str, number: int) -> str:
        """The first spelling that is there, or the most usual."""
        if self.in_gguf:  # ``blk.3.ffn_gate.7``, as llama.cpp wrote Mixtral before April 2024
            return f"{self._gguf_stem(f'{base}.{leaf}')}.{number}"
        stems = [f"{base}.{spelling.format(n=number)}" for spelling in _SINGLE[leaf]]
        return next((stem for stem in stems if stem in self.modules), stems[0])

    def _stacked_stem(self, name: str, base: str, leaf: str) -> str:
        if self.in_gguf:
            return self._gguf_stem(f"{name}.{leaf}") or f"{name}.{leaf}"
        stems = (f"{base}.{other}" for other in _STACKS[leaf])
        return next((stem for stem in stems if stem in self.stacks), f"{base}.{leaf}")

    def tensor(self, canonical: str) -> str:
        """The stored name of one tensor."""
        if self.in_gguf and (whole := self._gguf_stem(canonical)) is not None:
            return whole
        stem, _, suffix = canonical.rpartition(".")
        return f"{self._stem(stem, missing_ok=True)}.{suffix}"

    def find(self, *canonical: str) -> str | None:
        """The stored name of the first of these tensors that is there, marked as used."""
        for name in canonical:
            stored = self.tensor(name)
            if stored in self.header.tensors:
                self.used.add(stored)
                return stored
        return None

    def has(self, canonical: str) -> bool:
        """Whether a module of this name is stored."""
        return self._stem(canonical, missing_ok=True) in self.modules

    def _stem(self, canonical: str, missing_ok: bool = False) -> str:
        if self.in_gguf:
            stem = self._gguf_stem(canonical)
            if stem is None and not missing_ok:
                raise LowbitError(
                    "E0241",
                    f"{self.header.root.name}: GGUF files of {self.family.name} have no name for "
                    f"{canonical!r}; this variant is not supported",
                )
            return stem or canonical
        candidates = self._candidates(canonical)
        if self.tied and canonical == "model.embed_tokens":  # some tools keep the first name of the two
            candidates += self._candidates("lm_head")
        return next((stem for stem in candidates if stem in self.modules), candidates[0])

    def _candidates(self, canonical: str) -> list[str]:
        """Every spelling a Hugging Face checkpoint may use, the most usual first."""
        names = [canonical]
        for pattern, replacement in self.family.aliases:
            other = re.sub(pattern, replacement, canonical)
            if other != canonical:
                names.append(other)
        if self.prefix == "model.":
            return names
        placed = [self.prefix + name.removeprefix("model.") for name in names if name.startswith("model.")]
        return placed or [*names, *(f"language_model.{name}" for name in names)]

    def gguf_name(self, canonical: str) -> str:
        """What GGUF calls a module, whatever this checkpoint is; "" where it has no name for it.

        Where GGUF keeps gate and up apart, that of up: the two have the same type in every mix.
        """
        up = canonical.replace("gate_up_proj", "up_proj")
        return self._gguf_stem(canonical) or self._gguf_stem(up) or ""

    def _gguf_stem(self, canonical: str) -> str | None:
        number = re.search(r"\.(\d+)\.", canonical)
        general = canonical if number is None else canonical.replace(number[0], ".{n}.", 1)
        stored = self.family.gguf_names.get(general)
        return stored if stored is None or number is None else stored.format(n=number[1])

    def _layer_of(self, stored: str) -> int:
        number = re.search(r"(?:layers|blk)\.(\d+)\.", stored)
        return int(number[1]) if number else -1

    def take(self, names: Iterable[str]) -> None:
        """Mark tensors as used; a missing one is an error that names it."""
        for name in names:
            if name not in self.header.tensors:
                raise LowbitError(
                    "E0209",
                    f"{self.header.root.name}: no file contains {name!r} required by {self.family.name}; "
                    f"the checkpoint holds {len(self.header.tensors)} tensors",
                )
            self.used.add(name)

    def other_parts(self) -> list[str]:
        """Tensors of what stands beside the language model: vision and audio towers and their projectors."""
        known = [re.compile(pattern) for pattern in self.family.beside]
        return [
            name
            for name in self.header.tensors
            if name not in self.used and any(pattern.match(name) for pattern in known)
        ]

    def of_prediction(self) -> list[str]:
        """Tensors of layers behind the last, which predict tokens further on (MTP) and are not run."""
        if not self.family.prediction_layers:
            return []
        return [
            name
            for name in self.header.tensors
            if name not in self.used and (self._layer_of(name) >= self.layers or _PREDICTION.match(name))
        ]

    def refuse_leftovers(self) -> None:
        """Nothing a checkpoint stores is silently dropped."""
        known = [re.compile(pattern) for pattern in (*self.family.unused, *self.unused)]
        other = set(self.other_parts())
        left = [
            name
            for name in self.header.tensors
            if name not in self.used
            and name not in other
            and not any(pattern.fullmatch(name) for pattern in known)
            and not (self.family.prediction_layers and self._layer_of(name) >= self.layers)
        ]
        if left:
            shown = printable(left[0])
            raise LowbitError(
                "E0217",
                f"{self.header.file_of(left[0])}: tensor {shown!r} has no place in {self.family.name} "
                f"({len(left)} such of {len(self.header.tensors)}); config and weights are from different "
                "models, or this variant is not supported",
            )


def row_order(place: Placed, header: CheckpointHeader) -> Tensor | None:
    """int64 (out,): where each of the model's rows lies in the file; None if just there."""
    rows, heads = place.part.shape[0], place.rotary_heads
    if place.interleaved:
        return torch.arange(rows).view(rows // 2, 2).T.reshape(rows)
    if place.swapped:
        return torch.arange(rows).roll(rows // 2)
    if place.groups:
        by_group = torch.arange(rows).view(place.groups, -1)
        return torch.cat([part.flatten() for part in by_group.split(place.group_rows, 1)])
    if not heads:
        return None
    if rows % (2 * heads):
        raise LowbitError(
            "E0210",
            f"{header.root.name}: tensor '{place.module.stored}.weight' has {rows} rows, not {heads} heads "
            "of an even size; the file is damaged or of another kind",
        )
    # Row 2 j + b of a stored head is the model's row b D/2 + j.
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)


@dataclass(frozen=True)
class StoredRows:
    """What is here of a module whose rows stay as they are stored. ``runs``: which of them, ascending;
    ``places``: int64, where each of the wanted rows lies among those."""

    runs: list[tuple[int, int]]
    places: Tensor

    @staticmethod
    def of(place: Placed, header: CheckpointHeader) -> StoredRows:
        """The fewest runs of neighbours."""
        wanted, order = place.wanted_rows, row_order(place, header)
        here, ranked = (wanted if order is None else order[wanted]).sort()
        begins = [0, *((here.diff() != 1).nonzero().flatten() + 1).tolist(), len(here)]
        rows = here.tolist()
        return StoredRows([(rows[a], rows[b - 1] + 1) for a, b in pairwise(begins)], ranked.argsort())
