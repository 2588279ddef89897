"""Opened: a checkpoint with its family, format and config, and where and in which types it is to run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.formats import CheckpointFormat, Notes, detect
from lowbit.formats.kv_scales import KvScales, read_scales_file, wants_fp8_cache
from lowbit.kernels.device_memory import gpu_fault, has_gpu
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.loading.kernel_choice import KernelChoice
from lowbit.loading.online import is_float
from lowbit.models.config import ModelConfig
from lowbit.models.registry import Family, family_of, has_plain_head
from lowbit.numerics.cache_format import KvDtype
from lowbit.quantize.recipe import Asked, Recipe

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its family, its format and its config; ``recipe``: how to quantize it at load."""

    header: CheckpointHeader
    family: Family
    form: CheckpointFormat
    config: ModelConfig
    recipe: Recipe | None
    strict: bool
    notes: Notes  # what the format had to say, and will have while it reads

    @classmethod
    def of(cls, header: CheckpointHeader, asked: Asked, strict: bool) -> Opened:
        family = family_of(header)
        notes = Notes(strict)
        form = detect(header)(header, notes)
        recipe = None
        if is_float(header):
            recipe = asked.recipe()
        elif asked.flag:
            check_quantization(form, asked)
        config = family.config_of(header)
        if not config.tied_head and has_plain_head(header) and family.read_config(header).tied_head:
            notes.contradiction(
                "E0214",
                f"{header.root.name}: the config says that the embedding serves as head, and another head is "
                "stored (lm_head.weight); using that one. Set tie_word_embeddings to false, or to use the "
                "embedding remove the tensor",
            )
        return cls(header, family, form, config, recipe, strict, notes)

    @property
    def described(self) -> str:
        """How the weights are quantized: as the checkpoint says, or by what at load."""
        if self.recipe is None:
            return self.form.describe()
        return f"{self.recipe.described}, quantized at load"

    def kv_scales(self, path: str | None) -> KvScales:
        """The scales of the fp8 KV cache: of the file that was passed, or the checkpoint's own."""
        if path is None:
            return KvScales(self.header)
        return read_scales_file(Path(path), self.header, self.config.layers)


def check_quantization(form: CheckpointFormat, asked: Asked) -> None:
    """The config decides; a flag may only repeat it."""
    method = asked.quantization
    if method is None or (method != form.name and method not in form.aliases):
        flag = asked.flag.split()[0]
        raise LowbitError(
            "E0401",
            f"{asked.flag}: this model is already quantized ({form.describe()}); "
            f"drop {flag}, or pass the original model to re-quantize",
        )
    _log.warning("lowbit: --quantization %s is not needed: the checkpoint says %s", method, form.describe())


@dataclass(frozen=True)
class Target:
    """Where a model runs and in which types."""

    device: torch.device
    activation_dtype: torch.dtype
    cache_dtype: KvDtype
    dense_dtype: torch.dtype | None  # None: as stored
    int8_inputs: bool = False  # of weight-only layers (numerics.int8_inputs)
    kernels: KernelChoice = field(default_factory=KernelChoice)
    parallel: Parallel = ALONE

    @classmethod
    def resolve(
        cls,
        header: CheckpointHeader,
        device: str,
        dtype: str,
        kv: str,
        k: str = "auto",
        v: str = "auto",
        activations: str = "none",
        kernels: KernelChoice | None = None,
        parallel: Parallel = ALONE,
    ) -> Target:
        """``kv``, ``k`` and ``v``: the types of the cache, of both and of one.

        ``activations``: "none", or "int8". ``kernels``: None: by preference alone.
        ``parallel``: the rank that it is for; each has a GPU of its own.
        """
        if device == "auto":
            device = "cuda" if has_gpu() else "cpu"
        if device == "cuda" and (fault := gpu_fault()):
            raise LowbitError("E0412", f"--device cuda: {fault}; use --device cpu")
        on_cpu = device == "cpu"
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        exact = dtype == "float32" or (dtype == "auto" and _is_float32(header))
        half = not on_cpu and (dtype == "float16" or (dtype == "auto" and _says_float16(header)))
        if kv == "auto":
            kv = "fp8_e4m3" if wants_fp8_cache(header) else "f32" if exact else "fp16" if half else "bf16"
        cache = KvDtype.of(*(kv if one == "auto" else one for one in (k, v)))
        # The residual stream, norms and sums are float32 everywhere. On a CPU so is what goes into products:
        # kernels round it.
        own = torch.float16 if half else torch.bfloat16
        activation = torch.float32 if on_cpu or exact else (wanted or own)
        kernels = kernels or KernelChoice()
        kernels.inputs = activation
        return cls(
            torch.device("cuda", parallel.rank)
            if device == "cuda" and parallel.size > 1
            else torch.device(device),
            activation,
            cache,
            wanted if on_cpu else activation,
            activations == "int8",
            kernels,
            parallel,
        )


def _is_float32(header: CheckpointHeader) -> bool:
    """Whether all matrices are stored in float32: then nothing is rounded anywhere."""
    matrices = [entry.dtype for entry in header.tensors.values() if len(entry.shape) > 1]
    return bool(matrices) and set(matrices) == {"F32"}


def _says_float16(header: CheckpointHeader) -> bool:
    """Whether the config calls the model one of float16, as most AWQ and GPTQ files do: then their scales and
    plain matrices are, and none of them is rounded."""
    text = header.config.get("text_config")
    for config in (header.config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if key in config:
                return config[key] == "float16"
    return False
