"""What loading, planning and walking a checkpoint share: its names, its target and its parts' places."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.layers.experts import ExpertsSpec
from lowbit.layers.linear import Part
from lowbit.loading.kernel_choice import Wanted
from lowbit.loading.names import Names, Placed
from lowbit.loading.online import Decision, Online, facts_of, role_of
from lowbit.loading.opened import Opened, Target
from lowbit.numerics.int8_inputs import INT8_GROUPS
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

# Where rounding goes straight into logits: a third of the divergence for a prompt's one row.
_NEXT_TO_LOGITS = ("lm_head", "model.embed_tokens")


class Asker:
    """What loading and planning share: names, target and the parts' places."""

    def __init__(self, opened: Opened, target: Target) -> None:
        self.header = opened.header
        self.form = opened.form
        self.target = target
        self.device = target.device
        self.activation_dtype = target.activation_dtype
        self.cache_dtype = target.cache_dtype
        self.names = Names(opened.header, opened.family, opened.config.layers, opened.form.unused)
        self.online: Online | None = None
        if opened.recipe is not None:
            self.online = Online(opened.recipe, self.names, facts_of(opened.config), opened.strict)

    def placed(self, name: str, parts: list[Part]) -> list[Placed]:
        """The parts' stored modules, their tensors marked as used."""
        return [self._taken(place) for place in self.names.place(name, parts)]

    def placed_expert(self, name: str, spec: ExpertsSpec, number: int) -> tuple[list[Placed], list[Placed]]:
        """One expert's gate and up, and its down projection."""
        gate_up, down = self.names.expert(name, spec, number)
        return [self._taken(place) for place in gate_up], [self._taken(place) for place in down]

    def placed_stack(self, part: Part, stacked: int) -> list[Placed]:
        """The one module, or each of those stacked under one name."""
        [place] = self.names.place(part.name, [part])
        if not stacked:
            return [self._taken(place)]
        modules = [replace(place.module, expert=n, experts=stacked) for n in range(stacked)]
        return [self._taken(replace(place, module=module)) for module in modules]

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores a module of this canonical name."""
        return self.names.has(name)

    def row_norms(self, part: Part) -> Tensor:
        """Ones: only a loader has values."""
        return torch.ones(part.shape[0])

    def _taken(self, place: Placed) -> Placed:
        tensors = self.form.tensors_of(place.module)
        self.names.take(tensors)
        if place.part.bias:
            gguf = self.header.container == "gguf"
            bias = f"{place.module.stored}.bias" if gguf else place.module.tensor("bias")
            if bias not in tensors:
                self.names.take([bias])
        return place

    def stored_nbytes(self, place: Placed) -> int:
        """Bytes of the module in the files; its share of a stack of experts."""
        tensors = self.form.tensors_of(place.module)
        return sum(self.header.tensors[name].nbytes for name in tensors) // (place.module.experts or 1)

    def decide(self, place: Placed) -> Decision | None:
        """What quantizing at load makes of a module; None: nothing is quantized."""
        return None if self.online is None else self.online.decide(place, self.form.scheme_of(place.module))

    def check_vector(self, name: str, *shape: int) -> str:
        """The stored name of a float tensor of that shape."""
        stored = self.names.tensor(name)
        self.names.take([stored])
        entry = self.header.tensors[stored]
        if entry.shape != shape or entry.dtype not in ("F32", "F16", "BF16"):
            wanted = " x ".join(map(str, shape))
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {stored!r} is {entry.dtype} {list(entry.shape)} but the config "
                f"asks for {wanted} floats; config and weights are from different models",
            )
        return stored

    def wanted_kernel(self, place: Placed) -> Wanted:
        """What ``--linear-kernel`` says of a module."""
        return self.target.kernels.wanted(place.part.name, role_of(place))

    def with_inputs(self, place: Placed, scheme: Scheme) -> Scheme:
        """The scheme with int8 inputs, where they were asked for and its kernel can multiply them."""
        if not self.target.int8_inputs or scheme.is_dense or scheme.activation is not None:
            return scheme
        part = place.part
        if part.name in _NEXT_TO_LOGITS or part.router:
            return scheme
        run, asked = self.as_run(scheme), replace(scheme, activation=INT8_GROUPS)
        choice = self.target.kernels.of(self.wanted_kernel(place), asked, part.shape, self.device)
        return asked if choice.kernel.takes_int8(run, part.shape) else scheme

    def as_run(self, scheme: Scheme) -> Scheme:
        """Dense weights follow ``--dtype``; quantized ones are what they are. Inputs are the layer's."""
        if scheme.activation is not None:
            scheme = replace(scheme, activation=None)
        if not scheme.is_dense or self.target.dense_dtype is None:
            return scheme
        return replace(scheme, weight=number_format(_DTYPES[str(self.target.dense_dtype)[6:]]))
