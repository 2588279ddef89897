"""Online quantization of a float checkpoint: what each module becomes, and its making, as modules are read.

``Online`` sits between a format's reader and the kernels: a module that arrived as a plain matrix leaves as
what the recipe says, before parts are fused and packed. Planning asks the same questions without numbers.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.loading.names import Names, Placed
from lowbit.models.config import ModelConfig
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.gguf_mixes import ModelFacts
from lowbit.quantize.method import Method, Module, Quantized, Role, build_method
from lowbit.quantize.recipe import Recipe, fused_name
from lowbit.quantize.specification import MethodSpec

_log = logging.getLogger("lowbit")

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
SAMPLE_ROWS = 128  # what an estimate of a layer's error looks at: one row of blocks


@dataclass(frozen=True)
class Decision:
    """What becomes of one module: ``scheme`` in any case; ``method`` None: it stays plain, for ``reason``."""

    module: Module
    scheme: Scheme
    method: Method | None
    reason: str = ""

    @property
    def shares_scale(self) -> bool:
        """Whether it gets an outer scale, which is one for all parts of a layer (NVFP4): vLLM and SGLang,
        which run Q, K and V as one matrix, take the largest of several for all of them."""
        scheme = self.scheme
        return self.method is not None and scheme.weight.name == "e2m1" and len(scheme.blocks) == 2

    def with_largest(self, largest: float) -> Decision:
        """For a module whose layer has weights up to ``largest``."""
        return replace(self, module=replace(self.module, largest=largest))


T = TypeVar("T")


class Layers(Generic[T]):
    """The modules of each layer that share an outer scale, and how large their weights are."""

    def __init__(self, decided: Iterable[tuple[T, Decision]]) -> None:
        self._parts: dict[str, list[T]] = {}
        self._largest: dict[str, float] = {}
        for module, decision in decided:
            if decision.shares_scale:
                self._parts.setdefault(fused_name(decision.module.name), []).append(module)

    def decided(self, decision: Decision, largest: Callable[[T], float]) -> Decision:
        """The decision, with the scale of its layer; ``largest``: max |w| of one of its modules."""
        layer = fused_name(decision.module.name)
        if not decision.shares_scale or len(self._parts.get(layer, ())) < 2:
            return decision
        if layer not in self._largest:
            self._largest[layer] = max(map(largest, self._parts[layer]))
        return decision.with_largest(self._largest[layer])


@dataclass
class Online:
    """A recipe applied to a checkpoint. ``strict``: a module that cannot take its method is an error."""

    recipe: Recipe
    names: Names
    facts: ModelFacts
    strict: bool = False
    _methods: dict[str, Method] = field(default_factory=dict)
    _kept: Counter[str] = field(default_factory=Counter)

    def decide(self, place: Placed, stored: Scheme) -> Decision:
        """The recipe's verdict on a module stored as the plain ``stored``."""
        role = role_of(place)
        module = Module(
            place.part.name,
            place.part.shape,
            stored.weight.name,
            role,
            self.names.gguf_name(re.sub(r"\.experts\.\d+\.", ".experts.", place.part.name)),
            self.facts,
        )
        verdict = self.recipe.verdict(module.name, role, module.shape)
        if verdict.method is None:
            scheme = dense(verdict.dtype) if verdict.dtype else stored
            return Decision(module, scheme, None, verdict.reason)
        method = self._method(verdict.method)
        reason = method.refuses(module)
        if reason is not None:
            if self.strict:
                raise LowbitError(
                    "E0403",
                    f"{module.name}: {verdict.method.text}: {reason}; name it in --quantization-ignore, "
                    "choose another method, or drop --strict",
                )
            return Decision(module, stored, None, f"{verdict.method.text}: {reason}")
        scheme = method.scheme_of(module)
        if (
            role == "embedding"
        ):  # rows are looked up, and a tied head reads the same ones: no inputs to quantize
            scheme = replace(scheme, activation=None)
        return Decision(module, scheme, method)

    def _method(self, spec: MethodSpec) -> Method:
        if spec.key not in self._methods:
            self._methods[spec.key] = build_method(spec)
        return self._methods[spec.key]

    def quantize(self, decision: Decision, weight: QuantizedTensor) -> Quantized:
        """The plain ``weight`` as decided, and noted."""
        self.note(decision)
        if decision.method is None:
            if decision.scheme == weight.scheme:
                return Quantized(weight)
            codes = weight.codes.to(decision.scheme.weight.dtype)
            return Quantized(replace(weight, scheme=decision.scheme, codes=codes))
        made = decision.method.quantize(weight.codes, decision.module, weight.origin)
        if made.weight.scheme != decision.scheme:
            made = replace(made, weight=replace(made.weight, scheme=decision.scheme))
        return made

    def refuse_nothing(self, decisions: Iterable[Decision], what: str, model: str) -> None:
        """E0403 where ``what`` quantizes no module of ``model`` at all: there is nothing to save."""
        told = ""
        for decision in decisions:
            if decision.method is not None:
                return
            if not told and decision.module.role in ("linear", "expert"):
                told = f"{decision.module.name}: {decision.reason}"
        raise LowbitError(
            "E0403", f"{what} quantizes no layer of {model} ({told}); choose another method or group size"
        )

    def note(self, decision: Decision) -> None:
        """Count what stays plain, for the log."""
        if decision.method is None:
            kind = re.sub(r"\.\d+\.", ".*.", decision.module.name)
            self._kept[f"{kind} stays {decision.scheme}: {decision.reason}"] += 1

    def say_kept(self) -> None:
        """One log line for each kind of layer that stayed plain although its method was meant for it."""
        for line, count in self._kept.items():
            _log.info("lowbit: %s%s", line, f" ({count} layers)" if count > 1 else "")


def role_of(place: Placed) -> Role:
    """What a module is to a recipe."""
    name = place.part.name
    if place.part.router:
        return "router"
    if ".experts." in name:
        return "expert"
    if name == "lm_head":
        return "head"
    return "embedding" if name.endswith(("embed_tokens", "embed_positions")) else "linear"


def facts_of(config: ModelConfig) -> ModelFacts:
    """What llama.cpp's mixes depend on."""
    down_layers = None
    experts = 0
    if config.moe is not None:
        experts = config.moe.experts
        down_layers = [layer for layer in range(config.layers) if layer not in config.moe.layers]
    architecture = config.architecture.lower()
    architecture = architecture.removesuffix("forcausallm").replace("decilm", "deci")
    return ModelFacts(
        config.layers,
        config.heads,
        config.kv_heads,
        experts,
        config.tied_head,
        architecture,
        down_layers=down_layers,
    )


def is_float(header: CheckpointHeader) -> bool:
    """Whether every matrix is plain: a folder without a quantization config, or a GGUF file of floats."""
    matrices = [entry for entry in header.tensors.values() if len(entry.shape) > 1]
    # HQQ may store its codes as a view of floats.
    return all(entry.dtype in _FLOATS and not entry.name.endswith(".W_q") for entry in matrices)


def estimated_error(decision: Decision, rows: Tensor | None) -> float | None:
    """|Q(w) - w| / |w| over a few rows of the module; without its numbers, over as many normal ones."""
    if decision.method is None:
        return None
    module = decision.module
    if rows is None:
        shape = (min(SAMPLE_ROWS, module.shape[0]), module.shape[1])
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        rows = rows.to(number_format(module.dtype).dtype)
    few = replace(module, shape=(rows.shape[0], rows.shape[1]))
    made = decision.method.quantize(rows, few, module.name).weight.dequantize()
    wide = rows.float()
    return float((made - wide).norm() / wide.norm().clamp(min=1e-30))
