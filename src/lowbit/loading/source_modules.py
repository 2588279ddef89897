"""A checkpoint as a list of its modules, each to be read when its turn comes: what converting starts from.

The model's own ``build`` asks for every weight, as when it is loaded; here each answer is only written down,
with the name to write it under. From a Hugging Face folder that is its own stored name, rows and stacks as
they are; from GGUF it is the name, and the order of rows, that the family's checkpoints have. What one of the
two keeps in one matrix and the other does not is taken apart or put together (``models.hf_names``,
``latent``).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.kv_scales import KvScales
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.loading.asker import Asker
from lowbit.loading.latent import Latent, joined, scheme_of_joined
from lowbit.loading.names import Placed, row_order
from lowbit.loading.opened import Opened, Target
from lowbit.loading.planner import PlannedEmbedding
from lowbit.models.config import ModelConfig
from lowbit.models.deepseek import DeepseekConfig
from lowbit.models.gguf_metadata import SHIFTED_NORMS
from lowbit.models.hf_config import hf_config
from lowbit.models.hf_names import (
    fused_in_folders,
    fused_in_gguf,
    hf_name,
    in_turn,
    norms_by_heads,
    stacked_name,
)
from lowbit.models.qwen_next import QwenNextConfig
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.recipe import Asked
from lowbit.tokenization import check_vocabulary, load_tokenizer

_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# StableLM's checkpoints have a vector for each head, its GGUF files all of them in one tensor.
_NORM_OF_HEAD = re.compile(r"(.+\.[qk]_norm)\.norms\.(\d+)\.weight")
_EXPERT_LEAF = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class SourceModule:
    """One weight-bearing module. ``target``: under which names it is written.

    ``more``: stored modules whose rows follow those of ``place``. ``rows``: int64, which of all these rows it
    is, and in which order; None: all as they are. ``parts``: what it is made of, one below another in the
    order of the model.
    """

    target: StoredModule
    place: Placed
    scheme: Scheme
    nbytes: int  # in the source's files
    more: tuple[Placed, ...] = ()
    rows: Tensor | None = field(default=None, compare=False)
    parts: tuple[Part, ...] = ()
    latent: Latent | None = None  # a whole of the places' heads, or a half of a whole

    def halves(self) -> list[SourceModule]:
        """K's and V's half of an up projection of latent attention, as GGUF files have them."""
        assert self.latent is not None, "asked before"
        found = []
        for half in "kv":
            latent = replace(self.latent, half=half)
            name = self.place.part.name.replace("kv_b_proj", f"{half}_b_proj")
            module = StoredModule(name, name, latent.shape)
            place = replace(self.place, part=Part(name, latent.shape))
            scheme, nbytes = latent.scheme_of(self.scheme), self.nbytes // 2
            found.append(SourceModule(module, place, scheme, nbytes, self.more, latent=latent))
        return found

    def apart(self, header: CheckpointHeader) -> list[SourceModule]:
        """Its parts, each a module of its own under its canonical name."""
        if self.more:
            places = zip(self.parts, (self.place, *self.more), strict=True)
            share = self.nbytes // len(self.parts)
            return [
                SourceModule(
                    StoredModule(part.name, part.name, part.shape),
                    replace(place, part=part),
                    self.scheme,
                    share,
                )
                for part, place in places
            ]
        order = row_order(self.place, header)
        order = torch.arange(self.place.part.shape[0]) if order is None else order
        found, start = [], 0
        for part in self.parts:
            rows = part.shape[0]
            module = StoredModule(part.name, part.name, part.shape)
            share = self.nbytes * rows // self.place.part.shape[0]
            place = replace(self.place, part=part, rotary_heads=0, groups=0, interleaved=False, swapped=False)
            made = SourceModule(module, place, self.scheme, share, rows=order[start : start + rows])
            found.append(made)
            start += rows
        return found

    def unstacked(self, header: CheckpointHeader) -> list[SourceModule]:
        """An expert of a stack as modules of its own, gate and up apart, under their canonical names; where
        the stack lies under a prefix of its own (``model.language_model.``), under that."""
        found = self.apart(header) if len(self.parts) > 1 else [self]
        shapes = [(one.place.part.name, one.target.shape) for one in found]
        targets = [StoredModule(name, self.beside_stack(name), shape) for name, shape in shapes]
        return [replace(one, target=target) for one, target in zip(found, targets, strict=True)]

    def beside_stack(self, name: str) -> str:
        """The stored name of an expert of this stack with the canonical ``name``."""
        layer = re.search(r"\blayers\.\d+\.", name)
        at = -1 if layer is None else self.place.module.stored.find(layer[0])
        return name if layer is None or at < 0 else self.place.module.stored[:at] + name[layer.start() :]


@dataclass(frozen=True)
class SourceVector:
    """A small tensor beside the modules, canonically ``name``. ``shift`` is added to it (GGUF has Gemma's
    norms with 1 added, mlx-lm's Qwen3-Next too). ``beside``: of a vision or audio tower, and of any shape and
    size. ``row``: which row of the stored tensor it is; ``more``: stored tensors that follow as its further
    rows. ``shape``: that it is written in, where it is stored in another."""

    name: str
    target: str
    stored: str
    shift: float
    nbytes: int
    beside: bool = False
    row: int | None = None
    more: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ReadModule:
    """A module as it is to be written, or quantized and then written. ``told``: what goes on record of it."""

    target: StoredModule
    weight: QuantizedTensor
    bias: Tensor | None = None
    input: InputRule | None = None
    told: dict[str, object] = field(default_factory=dict)


class SourceModel:
    """An opened checkpoint. ``modules`` and ``vectors`` in the order of the layers. ``tokenizer``: whose
    tokenizer goes with it, its own if nobody says otherwise."""

    def __init__(self, header: CheckpointHeader, *, strict: bool = False) -> None:
        self.header = self.tokenizer = header
        opened = Opened.of(header, Asked(), strict)
        self.form, self.family = opened.form, opened.family
        self.config: ModelConfig = opened.config
        walk = _Walk(opened)
        opened.family.build(opened.config, walk)
        walk.refuse_leftovers()
        self.parts: list[SourceModule | SourceVector] = walk.parts + [
            SourceVector(name, name, name, 0.0, header.tensors[name].nbytes, beside=True)
            for name in walk.names.other_parts()
        ]
        self.has_kv_scales = walk.has_kv_scales
        self.prediction = walk.names.of_prediction()
        self._refuse_rotated(walk)

    def _refuse_rotated(self, walk: _Walk) -> None:
        """E0450 where layers rotate activations: the numbers of a weight alone are not the model."""
        rotated = [part for part in self.modules if part.scheme.rotated]
        said = f"{rotated[0].target.name} has its {rotated[0].scheme.rotated}" if rotated else ""
        if not said and (heads := walk.transforms.rotates_heads):
            said = f"the heads of Q and K are rotated ({heads})"
        if said:
            raise LowbitError(
                "E0450",
                f"{self.header.root.name}: {said} at run time, which no other format can say; its weights "
                "alone are not the model. Convert the original model",
            )

    @property
    def modules(self) -> list[SourceModule]:
        """The weight-bearing modules alone."""
        return [part for part in self.parts if isinstance(part, SourceModule)]

    @property
    def beside(self) -> dict[str, Scheme]:
        """The matrices of towers beside the language model, by module: written as they are, never quantized.

        E0450 where they are quantized: no other format's config could say how.
        """
        found = {}
        for part in self.parts:
            if isinstance(part, SourceVector) and part.beside:
                entry = self.header.tensors[part.stored]
                if entry.dtype not in _FLOATS:
                    raise LowbitError(
                        "E0450",
                        f"{entry.file}: tensor {printable(part.stored)!r} of what stands beside the language "
                        f"model is {entry.dtype}, quantized in its own way; convert the original model",
                    )
                if len(entry.shape) == 2 and part.stored.endswith(".weight"):
                    found[part.stored.removesuffix(".weight")] = dense(_FLOATS[entry.dtype])
        return found

    def take_tokenizer(self, other: CheckpointHeader) -> None:
        """Let that of another checkpoint go with the model, whose vocabulary must have room for it."""
        check_vocabulary(load_tokenizer(other, rows=self.config.vocab_size), self.config.vocab_size)
        self.tokenizer = other

    def for_gguf(self) -> SourceModel:
        """The same with what GGUF files of the family keep apart as modules of their own."""
        fused, made = fused_in_gguf(self.family.name), copy.copy(self)
        made.parts = []
        for part in self.parts:
            head = _NORM_OF_HEAD.fullmatch(part.name) if isinstance(part, SourceVector) else None
            if isinstance(part, SourceVector):
                if head is None:
                    made.parts.append(part)
                elif head[2] == "0":
                    names = [one.stored for one in self._of_heads(head[1])]
                    made.parts.append(replace(part, name=f"{head[1]}.weight", more=tuple(names[1:])))
            elif part.latent is not None:
                made.parts += part.halves()
            elif len(part.parts) > 1 and part.place.part.name.rpartition(".")[2] not in fused:
                made.parts += part.apart(self.header)
            else:
                made.parts.append(part)
        return made

    def unstacked(self) -> SourceModel:
        """The same with the experts of stacks as modules of their own, for formats that have no stacks."""
        made = copy.copy(self)
        made.parts = []
        for part in self.parts:
            if isinstance(part, SourceModule) and part.target.expert is not None:
                made.parts += part.unstacked(self.header)
            else:
                made.parts.append(part)
        return made

    def _of_heads(self, norm: str) -> list[SourceVector]:
        """The vectors of a norm that has one for each head, in their order."""
        vectors = (part for part in self.parts if isinstance(part, SourceVector))
        return [part for part in vectors if part.name.startswith(f"{norm}.norms.")]

    def read(self, module: SourceModule, data: TensorData) -> ReadModule:
        """The module in canonical form, rows in the order in which it is written."""
        found = [self._read(place, data) for place in (module.place, *module.more)]
        weight, bias, rule = found[0].weight, found[0].bias, found[0].input
        if module.latent is not None:
            return ReadModule(module.target, self._latent(module, module.latent, found), None, rule)
        if module.more:
            joined = concatenate([one.weight for one in found])
            if joined is None:
                kinds = " and ".join(sorted({str(one.weight.scheme) for one in found}))
                raise LowbitError(
                    "E0450",
                    f"{self.header.root.name}: {module.target.name} is one matrix in Hugging Face folders, "
                    f"and its parts are {kinds} here; convert the original model",
                )
            biases = [one.bias for one in found if one.bias is not None]
            weight, bias = joined, torch.cat(biases) if biases else None
        if module.rows is not None:
            weight = weight.permute_rows(module.rows)
            bias = None if bias is None else bias[module.rows]
        return ReadModule(module.target, weight, bias, rule)

    def _latent(self, module: SourceModule, latent: Latent, found: list[ReadModule]) -> QuantizedTensor:
        """The whole of an up projection of latent attention, or a half."""
        weights, rule = [one.weight for one in found], found[0].input
        weight = weights[0]
        if len(weights) > 1:
            weight = joined(weights, scheme_of_joined([one.scheme for one in weights]))
        if not latent.half:
            return weight
        return latent.cut(weight, None if rule is None else rule.multiplier)

    def _read(self, place: Placed, data: TensorData) -> ReadModule:
        """One stored module, the rows of each head as checkpoints have them."""
        stored = self.form.read(place.module, data)
        weight, bias = stored.weight, stored.bias
        if weight.scheme.output is not None:
            weight = replace(weight, scheme=replace(weight.scheme, output=None))
        if weight.scheme.written != weight.scheme:
            weight = weight.decoded(weight.scheme.written)
        reordered = self.header.container == "gguf" or self.header.rotary_pairs
        reordered = reordered and not place.part.groups  # which lie alike in files of both kinds
        order = row_order(place, self.header) if reordered else None
        if order is not None:
            weight = weight.permute_rows(order)
            bias = None if bias is None else bias[order]
        return ReadModule(place.module, weight, bias, stored.input)

    def read_vector(self, vector: SourceVector, data: TensorData) -> Tensor:
        """The tensor in its stored type; in float32 where it is shifted."""
        stored = data.tensor(vector.stored)
        if vector.more:
            stored = torch.stack([stored, *(data.tensor(name) for name in vector.more)])
        stored = stored if vector.row is None else stored[vector.row]
        stored = stored if vector.shape is None else stored.view(vector.shape)
        return stored.float() + vector.shift if vector.shift else stored

    def hf_config(self, data: TensorData) -> dict[str, object]:
        """config.json: the folder's own, or the one a GGUF file stands for."""
        if self.header.container == "gguf":
            return hf_config(self.header, self.config, data.tensor)
        found = dict(self.header.config)
        if not self.config.tied_head and self.family.read_config(self.header).tied_head:  # it has its own
            found["tie_word_embeddings"] = False
        if self.prediction and "num_nextn_predict_layers" in found:
            found["num_nextn_predict_layers"] = 0  # or tools look for them
        return found


class _Walk(Asker):
    """``WeightLoader`` that only writes down what it was asked for."""

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened, Target.resolve(opened.header, "cpu", "auto", "auto"))
        self.family, self.config = opened.family, opened.config
        self.in_gguf = opened.header.container == "gguf"
        self.parts: list[SourceModule | SourceVector] = []
        # GGUF calls Mixtral llama; transformers writes MiniMax-M2 under its names, too.
        experts = opened.config.moe is not None and self.in_gguf
        self.mixtral = experts and opened.family.name in ("llama", "minimax_m2")
        self.mlx = isinstance(opened.config, QwenNextConfig) and opened.config.mlx
        # Where norm weights are read with 1 added that transformers adds by itself.
        shifted = self.in_gguf and opened.family.name in SHIFTED_NORMS
        self.norm_shift = -1.0 if shifted or self.mlx else 0.0
        self._heads: list[Placed] = []  # of K's half of an up projection that is in two halves
        self._kv = KvScales(opened.header)
        self.has_kv_scales = False

    def stored_scheme(self, place: Placed) -> Scheme:
        """Vectors of rows, lattices and outliers are written as the floats that readers of them give."""
        return self.form.scheme_of(place.module).written

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        self._note(name, self.placed(name, parts), parts)
        return Linear(name, [], None)

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts without weights."""
        for number in range(spec.count):
            expert = f"{name}.{number}"
            gate_up = [
                Part(f"{expert}.{leaf}", (spec.intermediate, spec.hidden), bias=spec.bias)
                for leaf in ("gate_proj", "up_proj")
            ]
            first, down = self.placed_expert(name, spec, number)
            self._note(f"{expert}.gate_up_proj", first, gate_up)
            self._note(f"{expert}.down_proj", down, [down[0].part])
        return Experts(name, [], [])

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        self._note(part.name, self.placed(part.name, [part]), [part])
        return PlannedEmbedding()

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """A meta tensor of that shape."""
        places = self.placed_stack(part, stacked)
        if part.name.endswith(".k_b_proj"):
            self._heads = places
        elif part.name.endswith(".v_b_proj"):
            self._note_latent(self._heads, places)
        else:
            for place in places:
                self._note(part.name, [place], [part])
        return torch.empty((stacked, *part.shape) if stacked else part.shape, device="meta")

    def vector(self, name: str, *shape: int) -> Tensor:
        """Ones of that shape."""
        stored = self.check_vector(name, *shape)
        if not name.startswith("rope_"):  # made from the config, and put back there
            added = name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight")
            shift = self.norm_shift if added else 0.0
            stem, _, suffix = name.rpartition(".")
            target = f"{hf_name(self.family, stem)}.{suffix}" if self.in_gguf else stored
            whole = SourceVector(name, target, stored, shift, self.header.tensors[stored].nbytes)
            if self.mlx and len(shape) == 3:  # (channels, taps, 1) of a convolution
                whole = replace(whole, shape=(shape[0], shape[2], shape[1]))
            by_heads = self.in_gguf and norms_by_heads(self.family.name) and len(shape) > 1
            self.parts += self._of_each_head(whole, shape[0]) if by_heads else [whole]
        return torch.ones(shape)

    def _of_each_head(self, norm: SourceVector, heads: int) -> list[SourceVector]:
        found = []
        for row in range(heads):
            stem = f"{norm.name.removesuffix('.weight')}.norms.{row}"
            target = f"{hf_name(self.family, stem)}.weight"
            found.append(
                SourceVector(f"{stem}.weight", target, norm.stored, 0.0, norm.nbytes // heads, row=row)
            )
        return found

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """The cache's scales are not weights: found, and left behind."""
        self.has_kv_scales |= any(self._kv.find(self.names, attention))
        return 1.0, 1.0

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """Nothing is cached while a checkpoint is walked."""
        return self.cache_dtype

    def _note(self, name: str, places: list[Placed], parts: list[Part]) -> None:
        """Write down the module or modules of layer ``name`` that stand for ``parts``."""
        made = [
            SourceModule(place.module, place, self.stored_scheme(place), self.stored_nbytes(place))
            for place in places
        ]
        fused = len(parts) > 1 and len(made) == 1
        if fused:
            made = [replace(made[0], parts=tuple(parts))]
        if self.in_gguf:
            made = self._as_in_folders(name, made, parts, fused)
        elif any(place.module.dotted or place.swapped for place in places):
            made = made[0].apart(self.header) if fused else made
            made = [replace(one, target=self._target(one.place)) for one in made]
        elif self.family.transposed and ".layers." in name:  # packed ones lie as (out, in), plain ones do not
            made = [replace(one, target=replace(one.target, transposed=True)) for one in made]
        self.parts += [self._with_latent(one) for one in made]

    def _with_latent(self, module: SourceModule) -> SourceModule:
        """With the sizes that GGUF files cut it by, where it is an up projection of latent attention."""
        config = self.config
        if not (isinstance(config, DeepseekConfig) and module.place.part.name.endswith(".kv_b_proj")):
            return module
        latent = Latent(config.heads, config.kv_lora_rank, config.nope_dim, config.v_dim)
        return replace(module, latent=latent)

    def _note_latent(self, k: list[Placed], v: list[Placed]) -> None:
        """Both halves of an up projection as one module."""
        latent = Latent(len(k), k[0].part.shape[0], k[0].part.shape[1], v[0].part.shape[0])
        name = v[0].part.name.replace("v_b_proj", "kv_b_proj")
        places = (replace(k[0], part=Part(name, latent.shape)), *k[1:], *v)
        scheme = scheme_of_joined([self.stored_scheme(place) for place in places])
        nbytes = sum(self.stored_nbytes(place) for place in places)
        made = SourceModule(k[0].module, places[0], scheme, nbytes, places[1:], latent=latent)
        self.parts.append(replace(made, target=self._target(places[0])))

    def _as_in_folders(
        self, name: str, made: list[SourceModule], parts: list[Part], fused: bool
    ) -> list[SourceModule]:
        """Fused or not as the family's checkpoints are, under their names."""
        wanted = len(parts) > 1 and name.rpartition(".")[2] in fused_in_folders(self.family.name)
        if fused and not wanted:
            made = made[0].apart(self.header)
        elif wanted and not fused:
            first, *rest = made
            rows = sum(part.shape[0] for part in parts)
            place = replace(first.place, part=replace(parts[0], name=name, shape=(rows, parts[0].shape[1])))
            more = tuple(one.place for one in rest)
            nbytes = sum(one.nbytes for one in made)
            made = [SourceModule(first.target, place, first.scheme, nbytes, more, parts=tuple(parts))]
        if wanted:
            made = [replace(made[0], rows=self._order_in_folders(parts))]
        return [replace(one, target=self._target(one.place)) for one in made]

    def _order_in_folders(self, parts: list[Part]) -> Tensor | None:
        """int64: the rows of parts that lie one below another, in the order of the family's checkpoints."""
        rows, spec = sum(part.shape[0] for part in parts), Placed(parts[0], StoredModule("", "", (0, 0)))
        if in_turn(self.family.name) and not parts[0].rotary_heads:
            spec = replace(spec, interleaved=True)
        elif self.family.grouped_qkv and parts[0].rotary_heads:
            groups = parts[1].rotary_heads
            head = parts[0].shape[0] // parts[0].rotary_heads
            spec = replace(spec, groups=groups, group_rows=(parts[0].shape[0] // groups, head, head))
        else:
            return None
        order = row_order(replace(spec, part=replace(parts[0], shape=(rows, 0))), self.header)
        return None if order is None else order.argsort()

    def _target(self, place: Placed) -> StoredModule:
        """The name a checkpoint of the family has for a module of a GGUF file, or for one of a stack."""
        name, shape = place.part.name, place.part.shape
        if self.mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
            leaf = re.fullmatch(r"(.+\.experts\.\d+)\.(gate_proj|up_proj|down_proj)", name)
            name = name if leaf is None else f"{leaf[1]}.{_EXPERT_LEAF[leaf[2]]}"
            return StoredModule(name, name, shape)
        stack = stacked_name(self.family.name, name) if self.in_gguf else None
        if stack is not None:
            stored, number = stack
            turned = in_turn(self.family.name)
            return StoredModule(name, stored, shape, number, place.module.experts, transposed=turned)
        stored = hf_name(self.family, name) if self.in_gguf else name
        transposed = self.in_gguf and self.family.transposed and ".layers." in name
        return StoredModule(name, stored, shape, transposed=transposed)
