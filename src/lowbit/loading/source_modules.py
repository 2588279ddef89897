"""A checkpoint as a list of its modules, each to be read when its turn comes: what converting starts from.

The model's own ``build`` asks for every weight, as when it is loaded; here each answer is only written down,
with the name to write it under. From a Hugging Face folder that is its own stored name, rows and stacks as
they are; from GGUF it is the name, and the order of rows, that the family's checkpoints have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

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
from lowbit.loading.names import Placed, row_order
from lowbit.loading.opened import Opened, Target
from lowbit.loading.planner import PlannedEmbedding
from lowbit.models.config import ModelConfig
from lowbit.models.hf_config import hf_config
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.recipe import Asked

_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_EXPERT_LEAF = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class SourceModule:
    """One weight-bearing module. ``target``: under which names it is written."""

    target: StoredModule
    place: Placed
    scheme: Scheme
    nbytes: int  # in the source's files


@dataclass(frozen=True)
class SourceVector:
    """A small tensor beside the modules, canonically ``name``. ``shift`` is added to it (GGUF has Gemma's
    norms with 1 added). ``beside``: of a vision or audio tower, and of any shape and size."""

    name: str
    target: str
    stored: str
    shift: float
    nbytes: int
    beside: bool = False


@dataclass(frozen=True)
class ReadModule:
    """A module as it is to be written, or quantized and then written. ``told``: what goes on record of it."""

    target: StoredModule
    weight: QuantizedTensor
    bias: Tensor | None = None
    input: InputRule | None = None
    told: dict[str, object] = field(default_factory=dict)


class SourceModel:
    """An opened checkpoint. ``modules`` and ``vectors`` in the order of the layers."""

    def __init__(self, header: CheckpointHeader, *, strict: bool = False) -> None:
        self.header = header
        opened = Opened.of(header, Asked(), strict)
        self.form, self.family = opened.form, opened.family
        self.config: ModelConfig = opened.config
        walk = _Walk(opened)
        opened.family.build(opened.config, walk)
        walk.names.refuse_leftovers()
        self.parts: list[SourceModule | SourceVector] = walk.parts + [
            SourceVector(name, name, name, 0.0, header.tensors[name].nbytes, beside=True)
            for name in walk.names.other_parts()
        ]
        self.has_kv_scales = walk.has_kv_scales

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

    def read(self, module: SourceModule, data: TensorData) -> ReadModule:
        """The module in canonical form, rows in the order in which it is written."""
        stored = self.form.read(module.place.module, data)
        weight, bias = stored.weight, stored.bias
        reordered = self.header.container == "gguf" or self.header.rotary_pairs
        order = row_order(module.place, self.header) if reordered else None
        if order is not None:
            weight = weight.permute_rows(order)
            bias = None if bias is None else bias[order]
        return ReadModule(module.target, weight, bias, stored.input)

    def read_vector(self, vector: SourceVector, data: TensorData) -> Tensor:
        """The tensor in its stored type; in float32 where it is shifted."""
        stored = data.tensor(vector.stored)
        return stored.float() + vector.shift if vector.shift else stored

    def hf_config(self, data: TensorData) -> dict[str, object]:
        """config.json: the folder's own, or the one a GGUF file stands for."""
        if self.header.container == "gguf":
            return hf_config(self.header, self.config, data.tensor)
        return dict(self.header.config)


class _Walk(Asker):
    """``WeightLoader`` that only writes down what it was asked for."""

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened, Target.resolve(opened.header, "cpu", "auto", "auto"))
        self.family = opened.family
        self.in_gguf = opened.header.container == "gguf"
        self.parts: list[SourceModule | SourceVector] = []
        self.mixtral = opened.config.moe is not None and opened.family.name == "llama"
        # Where norm weights are read with 1 added that transformers adds by itself.
        self.norm_shift = -1.0 if self.in_gguf and opened.family.name in ("gemma2", "gemma3") else 0.0
        self._kv = KvScales(opened.header)
        self.has_kv_scales = False

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        self._note(self.placed(name, parts))
        return Linear(name, [], None)

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts without weights."""
        for number in range(spec.count):
            for places in self.placed_expert(name, spec, number):
                self._note(places)
        return Experts(name, [], [])

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        self._note(self.placed(part.name, [part]))
        return PlannedEmbedding()

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """A meta tensor of that shape."""
        self._note(self.placed_stack(part, stacked))
        return torch.empty((stacked, *part.shape) if stacked else part.shape, device="meta")

    def vector(self, name: str, *shape: int) -> Tensor:
        """Ones of that shape."""
        stored = self.check_vector(name, *shape)
        if not name.startswith("rope_"):  # made from the config, and put back there
            shift = self.norm_shift if name.endswith("norm.weight") else 0.0
            target = name if self.in_gguf else stored
            self.parts.append(SourceVector(name, target, stored, shift, self.header.tensors[stored].nbytes))
        return torch.ones(shape)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """The cache's scales are not weights: found, and left behind."""
        self.has_kv_scales |= any(self._kv.find(self.names, attention))
        return 1.0, 1.0

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """Nothing is cached while a checkpoint is walked."""
        return self.cache_dtype

    def _note(self, places: list[Placed]) -> None:
        for place in places:
            scheme = self.form.scheme_of(place.module)
            renamed = self.in_gguf or place.module.dotted
            target = self._target(place) if renamed else place.module
            self.parts.append(SourceModule(target, place, scheme, self.stored_nbytes(place)))

    def _target(self, place: Placed) -> StoredModule:
        """The name a checkpoint of the family has for a module of a GGUF file, or for one of a stack."""
        name = place.part.name
        if place.module.expert is not None and name.endswith("gate_up_proj"):
            raise LowbitError(
                "E0450",
                f"{self.header.root.name}: gate and up of the experts are fused; convert the original model, "
                "or a GGUF file made without --fuse-gate-up-exps",
            )
        if self.mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
            leaf = re.fullmatch(r"(.+\.experts\.\d+)\.(gate_proj|up_proj|down_proj)", name)
            name = name if leaf is None else f"{leaf[1]}.{_EXPERT_LEAF[leaf[2]]}"
        return StoredModule(name, name, place.part.shape)
