"""load_model and plan_model: the only package that knows checkpoints, formats, kernels and models together.

A model family asks for its weights through a ``WeightLoader``. ``loader`` answers by reading and packing,
``planner`` from headers alone, for ``lowbit inspect``. ``names`` knows where a module lies, ``online`` what
quantizing at load makes of it.
"""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
<<<<<<< HEAD
from lowbit.kernels.attention import choose_attention
from lowbit.loading.loader import Loader, Progress
from lowbit.loading.opened import Opened, Target, check_quantization
from lowbit.loading.planner import ModelPlan, ModulePlan, Planner
from lowbit.loading.quantizing import Calibration, quantized_checkpoint
=======
from lowbit.formats import CheckpointFormat, InputRule, Notes, detect
from lowbit.formats.kv_scales import KvScales, read_scales_file, wants_fp8_cache
from lowbit.kernels import PackedWeight, choose
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.attention import CacheSpec
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.loading import choice
from lowbit.loading.names import Names, Placed, row_order
from lowbit.loading.online import SAMPLE_ROWS, Decision, Online, estimated_error, facts_of, is_float
>>>>>>> serving
from lowbit.loading.samples import Samples
from lowbit.models.model import Model
from lowbit.quantize.recipe import Asked

<<<<<<< HEAD
__all__ = ["Calibration", "ModelPlan", "ModulePlan", "Progress", "check_quantization", "load_model", "plan_model"]
=======
_log = logging.getLogger("lowbit")

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what

_CACHE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}
_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class ModulePlan:
    """One stored module: what it is and which kernel will run it. ``refusals``: (kernel, reason).

    ``nbytes``: what it will occupy. When quantizing at load, ``reason``: why it stays plain; ``error``: the
    estimated |Q(w) - w| / |w|.
    """

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    kernel: str
    computes: str
    refusals: tuple[tuple[str, str], ...]
    nbytes: int
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True)
class ModelPlan:
    """A model as it would be loaded, from headers alone."""

    architecture: str
    format: str
    described: str  # "gptq, 4-bit, group 128"
    config: ModelConfig
    modules: list[ModulePlan]
    cache_specs: list[CacheSpec]
    device: str
    choice: str  # what --quantization auto chose and why, or ""
    peak_bytes: int  # of memory while loading, about: all packed weights and the largest module unpacked

    @property
    def weight_bytes(self) -> int:
        """Bytes of all planned modules."""
        return sum(module.nbytes for module in self.modules)

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
>>>>>>> serving


def load_model(
    header: CheckpointHeader,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    k_cache_dtype: str = "auto",
    v_cache_dtype: str = "auto",
    quantization: Asked | str | None = None,
    strict: bool = False,
    kv_scales_path: str | None = None,
    on_progress: Progress | None = None,
    samples: Samples | None = None,
    save: Path | None = None,
    calibration: Calibration | None = None,
) -> Model:
    """Read, fuse and pack every weight of the checkpoint; every stored tensor must find its use.

    ``quantization``: how to quantize a float checkpoint; of a quantized one, what the user believes its
    method is: anything but its own is E0401. ``strict``: contradictions the data could settle are errors.
    ``kv_scales_path``: a file with scales of the fp8 KV cache, instead of the checkpoint's own. ``samples``:
    gets some rows of each kind of layer, to time. ``save``: the folder the quantized checkpoint is left in;
    ``calibration``: the text calibrated methods look at.
    """
<<<<<<< HEAD
    opened = Opened.of(header, quantization, strict)
    if opened.recipe is None and save is not None:
        raise LowbitError(
            "E0405", "--save-quantized needs a float model and --quantization, --torchao-config or a recipe"
        )
    if opened.recipe is not None and (save is not None or opened.recipe.calibrated):
        made = quantized_checkpoint(opened, save=save, calibration=calibration, on_progress=on_progress)
        model = load_model(
            open_checkpoint(str(made)),
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            k_cache_dtype=k_cache_dtype,
            v_cache_dtype=v_cache_dtype,
            strict=strict,
            kv_scales_path=kv_scales_path,
            on_progress=on_progress,
            samples=samples,
        )
        model.quantization = opened.described
        return model
    target = Target.resolve(header, device, dtype, kv_cache_dtype, k_cache_dtype, v_cache_dtype)
    with TensorData(header) as data:
        loader = Loader(opened, target, data, opened.kv_scales(kv_scales_path), on_progress, samples)
=======
    target = _Target.resolve(header, device, dtype, kv_cache_dtype)
    asked = _resolved(header, quantization, target, strict)
    choice.say(asked)
    opened = _Opened.of(header, asked, strict)
    kv_scales = KvScales(header)
    if kv_scales_path is not None:
        kv_scales = read_scales_file(Path(kv_scales_path), header, opened.config.layers)
    with TensorData(header) as data:
        loader = _Loader(opened, target, data, kv_scales, on_progress, samples)
>>>>>>> serving
        model = opened.family.build(opened.config, loader)
        loader.names.refuse_leftovers()
    if loader.online is not None:
        loader.online.say_kept()
    _check_caches(model)
    model.kernels = frozenset(loader.kernels)
    model.quantization = opened.described
    model.weight_bytes = loader.packed_bytes
    model.states = loader.states
    return model


def plan_model(
    header: CheckpointHeader,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    k_cache_dtype: str = "auto",
    v_cache_dtype: str = "auto",
    quantization: Asked | str | None = None,
    strict: bool = False,
    kv_scales_path: str | None = None,
) -> ModelPlan:
    """What ``load_model`` would do, without reading a weight; but where it would quantize, a few rows of each
    are looked at to estimate the error."""
<<<<<<< HEAD
    opened = Opened.of(header, quantization, strict)
    target = Target.resolve(header, device, dtype, kv_cache_dtype, k_cache_dtype, v_cache_dtype)
    with TensorData(header) as data:
        planner = Planner(opened, target, data, opened.kv_scales(kv_scales_path))
=======
    target = _Target.resolve(header, device, dtype, kv_cache_dtype)
    asked = _resolved(header, quantization, target, strict)
    return _planned(header, asked, target, strict)


def _resolved(
    header: CheckpointHeader, quantization: Asked | str | None, target: _Target, strict: bool
) -> Asked:
    """What was asked for, with a method in place of auto."""
    asked = quantization if isinstance(quantization, Asked) else Asked(quantization)
    return choice.resolved(header, asked, lambda other: _planned(header, other, target, strict, False))


def _planned(
    header: CheckpointHeader, asked: Asked, target: _Target, strict: bool, estimate: bool = True
) -> ModelPlan:
    """``estimate``: whether errors are."""
    opened = _Opened.of(header, asked, strict)
    with TensorData(header) as data:
        planner = _Planner(opened, target, data, estimate)
>>>>>>> serving
        model = opened.family.build(opened.config, planner)
    planner.names.refuse_leftovers()
    _check_caches(model)
    return ModelPlan(
        architecture=opened.config.architecture,
        format=opened.form.name,
        described=opened.described,
        config=opened.config,
        modules=planner.modules,
        cache_specs=model.cache_specs(),
        device=planner.device.type,
        choice=asked.chosen,
        peak_bytes=planner.peak_bytes,
    )


<<<<<<< HEAD
def _check_caches(model: Model) -> None:
    """Some kernel serves every cache; else E0420 now, not when the first request comes."""
    for spec in dict.fromkeys(model.cache_specs()):
        choose_attention(spec, model.device)
=======
@dataclass(frozen=True)
class _Opened:
    """A checkpoint with its family, its format and its config; ``recipe``: how to quantize it at load."""

    header: CheckpointHeader
    family: Family
    form: CheckpointFormat
    config: ModelConfig
    recipe: Recipe | None
    strict: bool

    @classmethod
    def of(cls, header: CheckpointHeader, asked: Asked, strict: bool) -> _Opened:
        family = family_of(header)
        form = detect(header)(header, Notes(strict))
        recipe = None
        if is_float(header):
            recipe = asked.recipe()
        elif asked.flag:
            check_quantization(form, asked)
        return cls(header, family, form, family.read_config(header), recipe, strict)

    @property
    def described(self) -> str:
        """How the weights are quantized: as the checkpoint says, or by what at load."""
        if self.recipe is None:
            return self.form.describe()
        return f"{self.recipe.described}, quantized at load"


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
            cache = _CACHE_DTYPES[kv_cache_dtype]
        elif wants_fp8_cache(header):
            cache = torch.float8_e4m3fn
        # On a CPU the residual stream, norms and accumulation stay in float32; kernels round their inputs.
        activation = torch.float32 if on_cpu or exact else (wanted or torch.bfloat16)
        return cls(torch.device(device), activation, cache, wanted if on_cpu else activation)


def _is_float32(header: CheckpointHeader) -> bool:
    """Whether all matrices are stored in float32: then nothing is rounded anywhere."""
    matrices = [entry.dtype for entry in header.tensors.values() if len(entry.shape) > 1]
    return bool(matrices) and set(matrices) == {"F32"}


class _Asker:
    """What loading and planning share: names, target and the parts' places."""

    def __init__(self, opened: _Opened, target: _Target) -> None:
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
        """Dense weights follow ``--dtype``; quantized ones are what they are. Inputs are the layer's."""
        if scheme.activation is not None:
            scheme = replace(scheme, activation=None)
        if not scheme.is_dense or self.target.dense_dtype is None:
            return scheme
        return replace(scheme, weight=number_format(_DTYPES[str(self.target.dense_dtype)[6:]]))


@dataclass
class _Read:
    """One stored module read: its weight, bias and what it wants of its input."""

    weight: QuantizedTensor
    bias: Tensor | None
    transform: InputTransform | None
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.weight.shape[-2]


class _Loader(_Asker):
    """``WeightLoader`` that reads and packs."""

    def __init__(
        self,
        opened: _Opened,
        target: _Target,
        data: TensorData,
        kv_scales: KvScales,
        on_progress: Progress | None,
        samples: Samples | None,
    ) -> None:
        super().__init__(opened, target)
        self.data = data
        self.samples = samples
        self.tied_head = opened.config.tied_head
        self.on_progress = on_progress
        self.done = 0
        self.kernels: set[str] = set()
        self.packed_bytes = 0
        self._said_unused = False
        self._kv_scales = kv_scales

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """Read the parts, fuse neighbours that allow it, pack."""
        return self._linear(name, self.placed(name, parts))

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Read and pack one expert after another."""
        gate_up, down = [], []
        for number in range(spec.count):
            first, last = self.placed_expert(name, spec, number)
            gate_up.append(self._linear(f"{name}.{number}.gate_up_proj", first))
            down.append(self._linear(f"{name}.{number}.down_proj", last))
        return Experts(name, gate_up, down)

    def embedding(self, part: Part) -> Embedding:
        """Read and pack the embedding matrix."""
        [place] = self.placed(part.name, [part])
        weight = self._read(place).weight
        packed = self._pack(weight)
        if self.samples is not None and self.tied_head:
            self.samples.note(weight, packed, None)
        return Embedding(packed, self.activation_dtype)

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """The dequantized matrix itself, or (stacked, out, in) of them."""
        found = []
        for place in self.placed_stack(part, stacked):
            read = self._read(place, as_stored=True)
            matrix = read.weight.dequantize().to(self.device)
            if read.transform is not None and read.transform.multiplier is not None:
                matrix = matrix * read.transform.multiplier  # what x would have been multiplied by
            found.append(matrix)
        return torch.stack(found) if stacked else found[0]

    def vector(self, name: str, size: int) -> Tensor:
        """A float32 copy of a small tensor."""
        stored = self.check_vector(name, size)
        return self.data.tensor(stored).to(device=self.device, dtype=torch.float32, copy=True)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """What the checkpoint (or the file that was passed) says K and V are divided by in the cache."""
        found = self._kv_scales.of_layer(self.names, attention, layer, self.data)
        if self.cache_dtype is torch.float8_e4m3fn:
            return found
        if found != (1.0, 1.0) and not self._said_unused:
            self._said_unused = True
            _log.warning("lowbit: KV scales are only used with --kv-cache-dtype fp8_e4m3")
        return 1.0, 1.0

    def _linear(self, name: str, places: list[Placed]) -> Linear:
        read = [self._read(place) for place in places]
        bias = self._bias(read)
        weights, inputs = [], []
        for weight, transform in _fused(read):
            weights.append(self._pack(weight))
            inputs.append(transform)
            if self.samples is not None:
                self.samples.note(weight, weights[-1], transform)
        return Linear(name, weights, bias, inputs)

    def _read(self, place: Placed, as_stored: bool = False) -> _Read:
        stored = self.form.read(place.module, self.data)
        weight, bias, rule = stored.weight, stored.bias, stored.input
        order = row_order(place, self.header)
        if order is not None:
            weight = weight.permute_rows(order)
            bias = None if bias is None else bias[order]
        if self.online is not None and not as_stored and (decision := self.decide(place)) is not None:
            made = self.online.quantize(decision, weight)
            weight = made.weight
            rule = None if made.static_scale is None else InputRule(static_scale=made.static_scale)
        transform = self._transform(weight.scheme, rule)
        weight = self._cast(weight)
        if self.on_progress is not None:
            self.done += self.stored_nbytes(place)
            self.on_progress(self.done, self.header.nbytes, place.part.name)
        return _Read(weight, bias, transform)

    def _transform(self, scheme: Scheme, rule: InputRule | None) -> InputTransform | None:
        if scheme.activation is None and rule is None:
            return None
        rule = rule or InputRule()

        def owned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32, copy=True)

        return InputTransform(
            scheme.activation, owned(rule.multiplier), owned(rule.static_scale), owned(rule.static_zero)
        )

    def _cast(self, weight: QuantizedTensor) -> QuantizedTensor:
        scheme = self.as_run(weight.scheme)
        if scheme is weight.scheme:
            return weight
        if scheme.is_dense:
            return replace(weight, scheme=scheme, codes=weight.codes.to(scheme.weight.dtype))
        return replace(weight, scheme=scheme)

    def _pack(self, weight: QuantizedTensor) -> PackedWeight:
        kernel = choose(weight.scheme, weight.shape, self.device).kernel
        self.kernels.add(kernel.name)
        packed = kernel.pack(weight, self.device)
        check_packed(weight, packed)
        self.packed_bytes += packed.nbytes
        return packed

    def _bias(self, read: list[_Read]) -> Tensor | None:
        """The parts' biases below each other, zeros where a part has none."""
        if all(part.bias is None for part in read):
            return None
        rows = [torch.zeros(part.rows) if part.bias is None else part.bias.float() for part in read]
        return torch.cat(rows).to(device=self.device, dtype=self.activation_dtype)


def _fused(read: list[_Read]) -> Iterator[tuple[QuantizedTensor, InputTransform | None]]:
    """Neighbours that are alike joined, the rest by themselves; ``read`` is emptied on the way.

    Transforms that do the same become one object, so that a Linear runs them once.
    """
    inputs: list[InputTransform] = []
    while read:
        first = read.pop(0)
        transform = first.transform
        if transform is not None:
            transform = next((known for known in inputs if known.same_as(transform)), transform)
            inputs.append(transform)
        run = [first.weight]
        while read and _alike(transform, read[0].transform):
            joined = concatenate([*run, read[0].weight])
            if joined is None:
                break
            run = [joined]
            read.pop(0)
        yield run[0], transform


def _alike(a: InputTransform | None, b: InputTransform | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.same_as(b)


class _Planner(_Asker):
    """``WeightLoader`` that only writes down what would be read."""

    def __init__(self, opened: _Opened, target: _Target, data: TensorData, estimate: bool) -> None:
        super().__init__(opened, target)
        self.data = data
        self.estimate = estimate
        self.modules: list[ModulePlan] = []
        self.kv_tensors = KvScales(self.header)
        self.largest_module = 0

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        for place in self.placed(name, parts):
            self._plan(place)
        return Linear(name, [], None)

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts without weights."""
        for number in range(spec.count):
            for places in self.placed_expert(name, spec, number):
                for place in places:
                    self._plan(place)
        return Experts(name, [], [])

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        [place] = self.placed(part.name, [part])
        self._plan(place)
        return _PlannedEmbedding()

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """A meta tensor of that shape, which takes no memory; the plan counts it as float32."""
        for place in self.placed_stack(part, stacked):
            self._plan(place, unpacked=True)
        return torch.empty((stacked, *part.shape) if stacked else part.shape, device="meta")

    def vector(self, name: str, size: int) -> Tensor:
        """Ones: nothing is computed with them but frequencies nobody uses."""
        self.check_vector(name, size)
        return torch.ones(size)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """Their tensors have a place; their values do not matter here."""
        self.kv_tensors.find(self.names, attention)
        return 1.0, 1.0

    @property
    def peak_bytes(self) -> int:
        """Packed weights and the largest module with one byte a code; twice that where it is made here."""
        copies = 1 if self.online is None else 2
        return sum(module.nbytes for module in self.modules) + copies * self.largest_module

    def _plan(self, place: Placed, unpacked: bool = False) -> None:
        decision = None if unpacked else self.decide(place)
        scheme = self.form.scheme_of(place.module) if decision is None else decision.scheme
        shape = place.part.shape
        run_by = choose(self.as_run(scheme), shape, self.device)
        width = scheme.weight.bits / 8 if scheme.is_dense or scheme.weight.block is not None else 1
        self.largest_module = max(self.largest_module, int(shape[0] * shape[1] * width))
        nbytes = self.stored_nbytes(place)
        if unpacked:
            nbytes = 4 * shape[0] * shape[1]
        elif decision is not None and decision.method is not None:
            nbytes = round(shape[0] * shape[1] * scheme.bits_per_weight(shape) / 8)
        self.modules.append(
            ModulePlan(
                place.part.name,
                shape,
                scheme,
                "unpacked" if unpacked else run_by.kernel.name,
                run_by.kernel.computes,
                () if unpacked else run_by.refusals,
                nbytes,
                "" if decision is None else decision.reason,
                self._error(place, decision),
            )
        )

    def _error(self, place: Placed, decision: Decision | None) -> float | None:
        if decision is None or not self.estimate:
            return None
        return estimated_error(decision, self._sample(place, decision))

    def _sample(self, place: Placed, decision: Decision) -> Tensor | None:
        """Some rows of the stored weight; of a hub model only headers are here, the rest reads as zeros."""
        if decision.method is None:
            return None
        weight = self.form.read(place.module, self.data).weight
        rows = weight.rows(0, min(SAMPLE_ROWS, place.part.shape[0])).codes
        return rows if bool(rows.count_nonzero()) else None


class _PlannedEmbedding(Embedding):
    """An embedding nobody will look anything up in."""

    def __init__(self) -> None:
        pass

    def as_head(self) -> Linear:
        """A head without weights."""
        return Linear("lm_head", [], None)
>>>>>>> serving
