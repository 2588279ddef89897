"""The writing half of the formats: QuantizedTensor -> the tensors and the config a format's own tools expect.

A writer never rounds. It refuses, with the reason, what its format cannot hold exactly; changing numbers is
the business of quantizers. The writers live in modules called ``<format>_writer``; each has ``WRITERS``.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError, printable
from lowbit.formats import InputRule, StoredModule
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

# What transformers does with a quant_method it does not know: it logs a warning and loads what has the names
# and shapes of a plain model (quantizers/auto.py, supports_quant_method).
NOT_IN_TRANSFORMERS = (
    "transformers does not know it and opens the folder all the same: after a warning it takes the codes for "
    "weights, without their scales"
)
# What vLLM and SGLang make one layer of. Where they look for its name in a list of modules, they find it only
# if it stands there: they take such lists for names of layers (GPTQ's rules, AWQ's and bitsandbytes' lists).
_RUN_AS_ONE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings")


class CheckpointWriter:
    """Writes the modules of one checkpoint.

    ``schemes``: of every module that will be written, by its stored name, plain ones included: what the
    config says, and what concerns the whole checkpoint (GPTQ's v1 or v2), follows from them. ``stacks``:
    whether slices of stacked experts can be written; ``embeddings``: whether the tools read a quantized one;
    ``multiplies``: whether it has a place for a vector that inputs are multiplied by; ``one_group``: whether
    all modules have groups of the same size.
    """

    name: ClassVar[str]
    writes: ClassVar[str]  # for docs/formats.md
    stacks: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    one_group: ClassVar[bool] = False
    described: ClassVar[int] = 0  # bytes a module takes in a file's header, beside four tensors' names
    # Files the format has beside config.json; ``file_config`` says what goes into them.
    config_files: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config",)  # where config.json says it
    misread: ClassVar[str] = ""  # what ``warning`` says of every checkpoint of the format

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        self.schemes = dict(schemes)
        # What the modules written so far showed and headers do not: a run that goes on is told it again.
        self.learned: dict[str, float] = {}

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why the format cannot hold such a module exactly; None: it can."""
        return None if scheme.is_dense else f"{cls.name} holds plain floats only"

    @classmethod
    def refuses_module(cls, module: StoredModule) -> str | None:
        """Why the format cannot hold a quantized module in this place; None: it can."""
        if module.expert is not None and not cls.stacks:
            return "it is one of a stack of experts"
        if module.name.rpartition(".")[2] in EMBEDDINGS and not cls.embeddings:
            return "it is an embedding"
        return None

    def misfit(self, module: StoredModule) -> str | None:
        """Why a module that its scheme does not refuse cannot stand among the others; None: it can."""
        return None

    @classmethod
    def nearest(
        cls, weight: QuantizedTensor, input: InputRule | None
    ) -> tuple[QuantizedTensor, InputRule | None] | None:
        """The same but for outer scales rounded to what the format can say; None: that is no help here."""
        return None

    @classmethod
    def nearest_inputs(cls, scheme: Scheme) -> Scheme | None:
        """The same but for the rule by which inputs are quantized, as near as the format can say it; None:
        there is no such rule, or it is no help."""
        return None

    def write(
        self,
        module: StoredModule,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        input: InputRule | None = None,
    ) -> dict[str, Tensor]:
        """The module's tensors under the names the format's reader expects.

        Of a module that is an expert in a stack, each is this expert's slice of the tensor of that name.
        """
        planned = self.schemes.get(module.stored, weight.scheme)
        if planned.is_dense and weight.scheme.is_dense:
            found = {"weight": _plain(module, weight)}
        else:
            self._check(planned, module)
            if input is not None and input.multiplier is not None and not self.multiplies:
                raise cannot(self.name, module, "its input is multiplied by a vector before the product")
            found = self._pack(module, as_planned(weight, planned, module), input)
        if bias is not None:
            found["bias"] = bias
        return {module.tensor(suffix): tensor.contiguous() for suffix, tensor in found.items()}

    def warning(self) -> str:
        """Which tool opens the folder without an error and computes with other numbers, and what to do: a
        person is told it who writes one. "": none is known."""
        return self.misread

    def metadata(self) -> dict[str, str]:
        """What every shard's ``__metadata__`` says."""
        return {"format": "pt"}

    def description(self, module: StoredModule) -> dict[str, str]:
        """What ``__metadata__`` says of one module, in the shard that holds it."""
        return {}

    def quantization_config(self) -> dict[str, object] | None:
        """What config.json says under ``config_keys``; None: nothing."""
        return None

    def file_config(self, name: str) -> dict[str, object] | None:
        """What one of ``config_files`` says."""
        return self.quantization_config()

    def _check(self, scheme: Scheme, module: StoredModule) -> None:
        reason = self.refuses_to_write(scheme, module.shape)
        if module.expert is not None:  # an embedding is refused where a checkpoint is planned
            reason = reason or self.refuses_module(module)
        if reason is not None:
            raise cannot(self.name, module, reason)

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        """Tensors by suffix (``weight``, ``weight_scale``)."""
        raise AssertionError(f"{self.name} refuses every quantized scheme, or packs it")

    def quantized(self) -> dict[str, Scheme]:
        """The modules that are not plain."""
        return {name: scheme for name, scheme in self.schemes.items() if not scheme.is_dense}

    def usual_float(self) -> str:
        """PyTorch's name for the dtype of most plain matrices, which tools compute in; bfloat16 if none."""
        plain = Counter(scheme.weight.name for scheme in self.schemes.values() if scheme.is_dense)
        return _TORCH[plain.most_common(1)[0][0]] if plain else "bfloat16"

    def run_as_one(self, names: Collection[str]) -> list[str]:
        """The layers, as vLLM and SGLang call them, all of whose modules are among ``names``."""
        listed = set(names)
        found: dict[str, None] = {}
        for name in names:
            if _EXPERT.fullmatch(name) is not None:
                continue
            stem, _, leaf = name.rpartition(".")
            for layer, leaves in _RUN_AS_ONE.items():
                if leaf == leaves[0] and all(f"{stem}.{other}" in listed for other in leaves):
                    found[f"{stem}.{layer}"] = None
        experts: dict[str, bool] = {}
        for name in self.schemes:
            if (match := _EXPERT.fullmatch(name)) is not None:
                experts[match[1]] = experts.get(match[1], True) and name in listed
        return [*found, *(name for name, whole in experts.items() if whole)]

    def left_alone(self) -> list[str]:
        """The plain modules other than embeddings, which no tool takes for a Linear.

        A head that is tied to the embedding is no module of its own here, and one to the tools.
        """
        plain = [name for name, scheme in self.schemes.items() if scheme.is_dense]
        found = [name for name in plain if name.rpartition(".")[2] not in EMBEDDINGS]
        return found if any(name.endswith("lm_head") for name in self.schemes) else [*found, "lm_head"]


def largest_code(activation: ActivationScheme) -> float:
    """What the largest |x| of a block becomes."""
    return activation.limit or max(filter(math.isfinite, activation.number_format.values or (0.0,)))


def with_limit(scheme: Scheme, limit: float) -> Scheme | None:
    """The same with another ``limit`` of int8 inputs that are quantized when they come; None: it has none."""
    inputs = scheme.activation
    if inputs is None or inputs.number_format.name != "int8" or inputs.mode != "dynamic":
        return None
    return replace(scheme, activation=replace(inputs, limit=limit))


def cannot(form: str, module: StoredModule, reason: str) -> LowbitError:
    """E0450: the format cannot hold this module without changing its numbers."""
    return LowbitError(
        "E0450",
        f"--format {form}: {module.name} cannot be written without changing its numbers: {reason}. Choose "
        "another format (dense holds everything), quantize the original model, or add --requantize",
    )


def _plain(module: StoredModule, weight: QuantizedTensor) -> Tensor:
    return weight.codes.T if module.transposed else weight.codes


def as_planned(weight: QuantizedTensor, planned: Scheme, module: StoredModule) -> QuantizedTensor:
    """The weight as its plan said from headers alone: readers find more in the data.

    An asymmetric weight whose zero points are all in the middle was read as symmetric: its zero points are
    spelled out again. A promised column order that turned out trivial is left out.
    """
    found = weight.scheme
    if found.zero == "none" and planned.zero == "integer" and found.weight.name.startswith("int"):
        bits = int(found.weight.bits)
        zeros = torch.full(weight.scales[0].shape, 1 << bits - 1, dtype=torch.uint8)
        found = replace(found, weight=number_format(f"uint{bits}"), zero="integer")
        weight = replace(weight, scheme=found, zeros=zeros)
    if replace(found, reordered=planned.reordered) != planned:
        raise LowbitError(
            "E0450",
            f"{module.name}: its tensors are {found}, its config and headers promise {planned}; a checkpoint "
            "that contradicts itself is not converted (lowbit check MODEL --fix OUT may correct it)",
        )
    return weight


def grouped_rows(scheme: Scheme, columns: int) -> str | None:
    """Why this is not one scale for a group of columns of a row; None where it is."""
    if scheme.flattened or len(scheme.blocks) != 1 or scheme.offset:
        return f"scales lie as {scheme}; one for a group of columns of a row is needed"
    if scheme.blocks[0][0] != 1:
        return f"a scale covers {scheme.blocks[0][0] or 'all'} rows; one a row is needed"
    return None


@cache
def all_writers() -> dict[str, type[CheckpointWriter]]:
    """Every writer by its format's name."""
    import lowbit.formats as package

    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{package.__name__}.{name}") for name in names if name.endswith("_writer")
    ]
    return {writer.name: writer for module in modules for writer in module.WRITERS}


def writer_of(name: str) -> type[CheckpointWriter]:
    """The writer of a format, or E0450 with those that are."""
    writers = all_writers()
    if name not in writers:
        near = difflib.get_close_matches(name.lower(), writers, n=1)
        hint = f"did you mean {near[0]}? Written" if near else "written"
        known = ", ".join(sorted(writers))
        raise LowbitError("E0450", f"--format {printable(name)}: not written; {hint} are {known}")
    return writers[name]
