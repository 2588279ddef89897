"""load_model and plan_model: the only file that knows checkpoints, formats, kernels and models together.

A model family asks for its weights through a ``WeightLoader``. ``_Loader`` answers by reading a module in
canonical form, fusing equal parts, packing them for the chosen kernel and dropping the canonical form
before the next module is read, so that peak memory is the packed model plus one module. ``_Planner``
answers the same questions from headers alone, for ``lowbit inspect``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import CheckpointFormat, StoredLinear, StoredModule, detect
from lowbit.kernels import PackedWeight, choose
from lowbit.kernels.attention import CacheSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.models.registry import Family, family_of
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class ModulePlan:
    """One stored module: what it is and which kernel will run it. ``refusals``: (kernel, reason)."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    kernel: str
    computes: str
    refusals: tuple[tuple[str, str], ...]
    stored_nbytes: int


@dataclass(frozen=True)
class ModelPlan:
    """A model as it would be loaded, from headers alone."""

    architecture: str
    format: str
    config: ModelConfig
    modules: list[ModulePlan]
    cache_specs: list[CacheSpec]
    device: str

    @property
    def weight_bytes(self) -> int:
        """Stored bytes of all planned modules."""
        return sum(module.stored_nbytes for module in self.modules)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache one token needs over all layers."""
        return sum(spec.token_bytes() for spec in self.cache_specs)

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return self.config.context_length

    @property
    def parameters(self) -> int:
        """Weights in the planned modules (norms not counted)."""
        return sum(module.shape[0] * module.shape[1] for module in self.modules)


def load_model(
    header: CheckpointHeader,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    on_progress: Progress | None = None,
) -> Model:
    """Read, fuse and pack every weight of the checkpoint; every stored tensor must find its use."""
    family, form = family_of(header), detect(header)
    config = family.read_config(header)
    with TensorData(header) as data:
        loader = _Loader(header, family, form, data, _Target.resolve(header, device, dtype, kv_cache_dtype))
        loader.on_progress = on_progress
        model = family.build(config, loader)
        loader.names.refuse_leftovers()
    model.kernels = frozenset(loader.kernels)
    return model


def plan_model(
    header: CheckpointHeader, *, device: str = "auto", dtype: str = "auto", kv_cache_dtype: str = "auto"
) -> ModelPlan:
    """What ``load_model`` would do, without reading a weight."""
    family, form = family_of(header), detect(header)
    config = family.read_config(header)
    planner = _Planner(header, family, form, _Target.resolve(header, device, dtype, kv_cache_dtype))
    model = family.build(config, planner)
    planner.names.refuse_leftovers()
    return ModelPlan(
        architecture=config.architecture,
        format=form.name,
        config=config,
        modules=planner.modules,
        cache_specs=model.cache_specs(),
        device=planner.device.type,
    )


@dataclass(frozen=True)
class _Target:
    """Where a model runs and in which types."""

    device: torch.device
    activation_dtype: torch.dtype
    cache_dtype: torch.dtype
    dense_dtype: torch.dtype | None  # None: as stored

    @classmethod
    def resolve(cls, header: CheckpointHeader, device: str, dtype: str, kv_cache_dtype: str) -> _Target:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise LowbitError("E0412", "--device cuda: torch sees no CUDA device here; use --device cpu")
        on_cpu = device == "cpu"
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        exact = dtype == "float32" or (dtype == "auto" and _is_float32(header))
        cache = torch.float32 if exact else torch.bfloat16
        if kv_cache_dtype != "auto":
            cache = {"bf16": torch.bfloat16, "f32": torch.float32}[kv_cache_dtype]
        # On a CPU the residual stream, norms and accumulation stay in float32; kernels round their inputs.
        activation = torch.float32 if on_cpu or exact else (wanted or torch.bfloat16)
        return cls(torch.device(device), activation, cache, wanted if on_cpu else activation)


def _is_float32(header: CheckpointHeader) -> bool:
    """Whether all matrices are stored in float32: then nothing is rounded anywhere."""
    matrices = [entry.dtype for entry in header.tensors.values() if len(entry.shape) > 1]
    return bool(matrices) and set(matrices) == {"F32"}


class _Names:
    """The tensors of a checkpoint under the model's names; remembers which were used."""

    def __init__(self, header: CheckpointHeader, family: Family, architecture: str) -> None:
        self.header = header
        self.family = family
        self.architecture = architecture
        self.used: set[str] = set()

    def module(self, part: Part) -> StoredModule:
        """The part as the container stores it."""
        in_gguf = self.header.container == "gguf"
        rotates = in_gguf and self.family.gguf_rotates_pairs
        return StoredModule(part.name, self._stem(part.name), part.shape, part.rotary_heads if rotates else 0)

    def tensor(self, canonical: str) -> str:
        """The stored name of one tensor."""
        stem, _, suffix = canonical.rpartition(".")
        return f"{self._stem(stem)}.{suffix}"

    def _stem(self, canonical: str) -> str:
        if self.header.container != "gguf":
            return canonical
        number = re.search(r"\.(\d+)\.", canonical)
        general = canonical if number is None else canonical.replace(number[0], ".{n}.", 1)
        stored = self.family.gguf_names[general]
        return stored if number is None else stored.format(n=number[1])

    def take(self, names: Iterable[str]) -> None:
        """Mark tensors as used; a missing one is an error that names it."""
        for name in names:
            if name not in self.header.tensors:
                raise LowbitError(
                    "E0209",
                    f"{self.header.root.name}: no file contains {name!r} required by {self.architecture}; "
                    f"the checkpoint holds {len(self.header.tensors)} tensors",
                )
            self.used.add(name)

    def refuse_leftovers(self) -> None:
        """Nothing a checkpoint stores is silently dropped."""
        known = [re.compile(pattern) for pattern in self.family.unused]
        left = [
            name
            for name in self.header.tensors
            if name not in self.used and not any(pattern.fullmatch(name) for pattern in known)
        ]
        if left:
            shown = printable(left[0])
            raise LowbitError(
                "E0217",
                f"{self.header.file_of(left[0])}: tensor {shown!r} has no place in {self.architecture} "
                f"({len(left)} such of {len(self.header.tensors)}); config and weights are from different "
                "models, or this variant is not supported",
            )


class _Asker:
    """What loading and planning share: names, target and the parts' stored modules."""

    def __init__(
        self, header: CheckpointHeader, family: Family, form: CheckpointFormat, target: _Target
    ) -> None:
        self.header = header
        self.form = form
        self.target = target
        self.device = target.device
        self.activation_dtype = target.activation_dtype
        self.cache_dtype = target.cache_dtype
        self.names = _Names(header, family, family.name)

    def stored(self, part: Part) -> StoredModule:
        """The part's stored module, its tensors marked as used."""
        module = self.names.module(part)
        tensors = self.form.tensors_of(self.header, module)
        self.names.take(tensors)
        bias = f"{module.stored}.bias"
        if part.bias and bias not in tensors:
            self.names.take([bias])
        return module

    def check_vector(self, name: str, size: int) -> str:
        """The stored name of a 1-D tensor of ``size`` elements."""
        stored = self.names.tensor(name)
        self.names.take([stored])
        entry = self.header.tensors[stored]
        if entry.shape != (size,) or entry.dtype not in ("F32", "F16", "BF16"):
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {stored!r} is {entry.dtype} {list(entry.shape)} but the config "
                f"asks for {size} floats; config and weights are from different models",
            )
        return stored

    def as_run(self, scheme: Scheme) -> Scheme:
        """Dense weights follow ``--dtype``; quantized ones are what they are."""
        if not scheme.is_dense or self.target.dense_dtype is None:
            return scheme
        return replace(scheme, weight=number_format(_DTYPES[str(self.target.dense_dtype)[6:]]))


class _Loader(_Asker):
    """``WeightLoader`` that reads and packs."""

    def __init__(
        self,
        header: CheckpointHeader,
        family: Family,
        form: CheckpointFormat,
        data: TensorData,
        target: _Target,
    ) -> None:
        super().__init__(header, family, form, target)
        self.data = data
        self.on_progress: Progress | None = None
        self.done = 0
        self.kernels: set[str] = set()

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """Read the parts, fuse them where they allow it, pack."""
        read = [self._read(part) for part in parts]
        fused = concatenate([self._cast(r.weight) for r in read])
        weights = [fused] if fused is not None else [self._cast(r.weight) for r in read]
        return Linear(name, [self._pack(weight) for weight in weights], self._bias(read))

    def embedding(self, part: Part) -> Embedding:
        """Read and pack the embedding matrix."""
        return Embedding(self._pack(self._cast(self._read(part).weight)), self.activation_dtype)

    def vector(self, name: str, size: int) -> Tensor:
        """A float32 copy of a small tensor."""
        stored = self.check_vector(name, size)
        return self.data.tensor(stored).to(device=self.device, dtype=torch.float32, copy=True)

    def _read(self, part: Part) -> StoredLinear:
        module = self.stored(part)
        read = self.form.read(self.header, module, self.data)
        if read.input is not None:
            raise LowbitError("E0218", f"{read.weight.origin}: its input rule is not supported yet")
        if self.on_progress is not None:
            self.done += sum(
                self.header.tensors[name].nbytes for name in self.form.tensors_of(self.header, module)
            )
            self.on_progress(self.done, self.header.nbytes, part.name)
        return read

    def _cast(self, weight: QuantizedTensor) -> QuantizedTensor:
        scheme = self.as_run(weight.scheme)
        if scheme is weight.scheme:
            return weight
        return replace(weight, scheme=scheme, codes=weight.codes.to(scheme.weight.dtype))

    def _pack(self, weight: QuantizedTensor) -> PackedWeight:
        kernel = choose(weight.scheme, weight.shape, self.device).kernel
        self.kernels.add(kernel.name)
        return kernel.pack(weight, self.device)

    def _bias(self, read: list[StoredLinear]) -> Tensor | None:
        """The parts' biases below each other, zeros where a part has none."""
        if all(part.bias is None for part in read):
            return None
        rows = [
            torch.zeros(part.weight.shape[-2]) if part.bias is None else part.bias.float() for part in read
        ]
        return torch.cat(rows).to(device=self.device, dtype=self.activation_dtype)


class _Planner(_Asker):
    """``WeightLoader`` that only writes down what would be read."""

    def __init__(
        self, header: CheckpointHeader, family: Family, form: CheckpointFormat, target: _Target
    ) -> None:
        super().__init__(header, family, form, target)
        self.modules: list[ModulePlan] = []

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        for part in parts:
            self._plan(part)
        return Linear(name, [], None)

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        self._plan(part)
        return _PlannedEmbedding()

    def vector(self, name: str, size: int) -> Tensor:
        """Ones: nothing is computed with them but frequencies nobody uses."""
        self.check_vector(name, size)
        return torch.ones(size)

    def _plan(self, part: Part) -> None:
        module = self.stored(part)
        scheme = self.form.scheme_of(self.header, module)
        choice = choose(self.as_run(scheme), part.shape, self.device)
        stored = sum(self.header.tensors[name].nbytes for name in self.form.tensors_of(self.header, module))
        self.modules.append(
            ModulePlan(
                part.name,
                part.shape,
                scheme,
                choice.kernel.name,
                choice.kernel.computes,
                choice.refusals,
                stored,
            )
        )


class _PlannedEmbedding(Embedding):
    """An embedding nobody will look anything up in."""

    def __init__(self) -> None:
        pass

    def as_head(self) -> Linear:
        """A head without weights."""
        return Linear("lm_head", [], None)
