"""convert: a checkpoint in another format, the numbers the same; or as plain floats; or, asked for, anew.

A format that cannot hold a module's numbers exactly refuses, naming the module and the reason, before
anything is written. ``dense`` holds everything: in float32 exactly, in a narrower type either exactly too
(``exact_dtype``) or, where the user asks for it, rounded and the rounding counted. ``requantize`` quantizes
what the format cannot hold by a method, and says how far each module's numbers went. Whatever is written is
read back and compared before it has its name (``proof``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.safetensors_writer import SHARD_BYTES
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, thousands
from lowbit.formats.dense_writer import DenseWriter, exact_dtype
from lowbit.formats.gguf_writer import GgufWriter
from lowbit.formats.gptq import Gptq
from lowbit.formats.gptq_writer import GptqWriter
from lowbit.formats.writing import CheckpointWriter, cannot, largest_code, writer_of
from lowbit.loading.gguf_saving import require_gguf, save_gguf
from lowbit.loading.online import Decision, Layers
from lowbit.loading.proof import Numbers, beside, certificate, compare, files_of, prove, write_certificate
from lowbit.loading.requantizing import Planned, Requantizing, as_written, exact
from lowbit.loading.saving import NamedTensor, Part, digest_of, left_out, planned_nbytes, save_checkpoint
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule, SourceVector
from lowbit.models.config_keys import architecture_of
from lowbit.models.gguf_metadata import SEEING
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.recipe import fused_name

VERSION = 2  # of what a journal depends on beside its key: raised when what is written changes
MOST_LINES = 20  # of modules that changed, for people; the certificate has all

Progress = Callable[[int, int, str], None]
Json = dict[str, object]


@dataclass
class Conversion:
    """What was written. ``dtype``: of the plain numbers, None where they were left as they are. ``errors``:
    of each module whose numbers changed, how far: (largest |change|, the same to the largest of its row)."""

    out: Path
    form: str
    dtype: str | None
    modules: int
    nbytes: int = 0
    rounding: float = 0.0
    notes: list[str] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)  # of these modules an outer scale, nothing else
    method: str = ""  # of requantizing
    resumed: int = 0  # shards, or tensors of a GGUF file, that an earlier run had finished

    def prove(self, path: Path, source: SourceModel, told: Mapping[str, Json], lost: Collection[str]) -> None:
        """Read back what was written under ``path``, compare it, and leave a certificate.

        ``told``: what was said of each module while it was written; ``lost``: notes on what was left out.
        """
        named = {str(one["name"]): one for one in told.values() if one}
        prove(path, self.form, source, named)
        self.errors = {
            name: (float(str(one["largest_error"])), float(str(one["largest_relative_error"])))
            for name, one in named.items()
            if "largest_error" in one
        }
        self.rounded = [name for name, one in named.items() if "rounded" in one]
        modules = {name: {k: v for k, v in one.items() if k != "name"} for name, one in named.items()}
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        files = files_of(paths)
        self.nbytes = sum(file.stat().st_size for file in paths)
        notes = [*self.notes, *lost]
        text = certificate(source, self.form, self.dtype, files, modules, _version(), notes)
        write_certificate(path, text)


def convert(
    header: CheckpointHeader,
    form: str,
    out: Path,
    *,
    dtype: str | None = None,
    requantize: str | None = None,
    force: bool = False,
    strict: bool = False,
    tokenizer: CheckpointHeader | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint in format ``form`` to the folder ``out``. ``dtype``: bf16, f16 or f32.

    ``requantize``: a method for what the format cannot hold, "" for its usual one; None: that is refused.
    ``tokenizer``: the checkpoint whose tokenizer goes with it, if not its own.
    """
    source = SourceModel(header, strict=strict)
    if tokenizer is not None:
        source.take_tokenizer(tokenizer)
    if form == "gguf":
        require_gguf()
        source = source.for_gguf()
    work = Work(source, form, dtype, requantize)
    source = work.source
    with TensorData(header) as data:
        work.settle(data)
    done = Conversion(out, form, work.dtype, len(source.modules), notes=work.notes(), method=work.method)
    depends_on = {
        "source": digest_of(header),
        "--format": form,
        "--dtype": dtype or "auto",
        "--requantize": work.method or "no",
        "--tokenizer": "its own" if tokenizer is None else tokenizer.root.name,
        "lowbit": f"{_version()}, {VERSION}",
    }

    def check(path: Path, told: Mapping[str, Json], lost: Collection[str] = ()) -> None:
        if apart := _outer_scales_apart(told):
            done.notes.append(apart)
        done.prove(path, source, told, lost)

    with TensorData(header) as data:
        if isinstance(work.writer, GgufWriter):
            saved = save_gguf(
                out,
                source,
                work.writer.schemes,
                lambda module: work.read(module, data),
                data,
                depends_on=depends_on,
                force=force,
                on_progress=on_progress,
                check=check,
            )
            done.notes += saved.notes
            done.resumed = saved.resumed
            return done
        journal = Journal(depends_on | {"shard size": str(shard_bytes)})

        def parts(known: Collection[str]) -> Iterator[Part]:
            done.resumed = len(journal.lines)
            return _parts(work, data, known, on_progress)

        save_checkpoint(
            out,
            header,
            source.hf_config(data),
            parts,
            work.writer,
            nbytes=work.planned_nbytes(),
            tensors=4 * len(source.parts),
            dtype=work.dtype,
            tokenizer=tokenizer,
            as_measured=work.is_exact,
            force=force,
            shard_bytes=shard_bytes,
            journal=journal,
            check=check,
        )
    done.rounding = work.writer.learned.get("rounding", 0.0)
    return done


class Work:
    """A source, the writer for all of it, and what becomes of each module."""

    def __init__(self, source: SourceModel, form: str, dtype: str | None, requantize: str | None) -> None:
        self.source, self.form = source, form
        self.dtype: str | None = None
        self.rounds = dtype is not None
        self.anew: Requantizing | None = None
        self._layers: Layers[SourceModule] | None = None  # once it is settled what is made anew
        self.writer: CheckpointWriter
        kind = writer_of(form)
        quantized = [one for one in source.modules if requantize is not None or not one.scheme.is_dense]
        if not kind.stacks and any(one.target.expert is not None for one in quantized):
            self.source = source = source.unstacked()
        if requantize is not None and not issubclass(kind, DenseWriter):
            self.anew = Requantizing(source, kind, requantize)
        if issubclass(kind, DenseWriter):
            if requantize is not None:
                raise LowbitError(
                    "E0405", "--requantize is for formats of few bits; --format dense rounds by --dtype"
                )
            self._plan_dense(dtype)
            return
        self._refuse(dtype)
        if self.anew is None:
            self.planned = {one.target.name: exact(kind, one) for one in source.modules}
            self.writer = self._writer(kind)
            static = isinstance(source.form, Gptq) and source.form.rule.static_groups
            if static and isinstance(self.writer, GptqWriter):
                self.writer.made = {"static_groups": True}
            return
        self.planned = {one.target.name: self.anew.planned(one) for one in source.modules}
        try:
            self.writer = kind(self._schemes())  # a misfit is made anew in ``settle``
            self.writer.quantization_config()
        except LowbitError:  # what is held exactly and what is made do not go together: one group size, say
            self._plan_anew(kind, self.anew)

    def _plan_anew(self, kind: type[CheckpointWriter], anew: Requantizing) -> None:
        """Every module by the method; in one group size, where the format has no other."""
        self.planned = {one.target.name: anew.planned(one, all_anew=True) for one in self.source.modules}
        if kind.one_group and anew.choose_one_group(list(self.planned.values())):
            self.planned = {one.target.name: anew.planned(one, all_anew=True) for one in self.source.modules}
        self.writer = self._writer(kind)

    def _writer(self, kind: type[CheckpointWriter]) -> CheckpointWriter:
        """The format's writer of all modules as they are planned; E0450 for one that has no place in it."""
        made = kind(self._schemes())
        for module in self.source.modules:
            if (reason := made.misfit(module.target)) is not None:
                raise cannot(made.name, module.target, reason)
        return made

    def settle(self, data: TensorData) -> None:
        """Plan anew what only the data show not to fit: an outer scale, a multiplied input."""
        if self.anew is None:
            return
        if not isinstance(self.writer, GgufWriter) and not self.writer.quantized():
            self.anew.refuse_nothing()
        refused = []
        for module in self.source.modules:
            planned = self.planned[module.target.name]
            if planned.decision is None and not planned.scheme.is_dense:
                made = as_written(self.source.read(module, data), planned.scheme)
                if self._holds(made):
                    continue
                near = self._nearest(made)
                if near is not None and self._holds(near):
                    self.planned[module.target.name] = replace(planned, nearest=True)
                else:
                    refused.append(module)
        for module in refused:
            self.planned[module.target.name] = self.anew.planned(module, all_anew=True)
        if refused:
            try:
                self.writer = self._writer(type(self.writer))
            except LowbitError:
                self._plan_anew(type(self.writer), self.anew)

    def _holds(self, made: ReadModule) -> bool:
        """Whether the format can say the module's numbers, beside the others."""
        if self.writer.misfit(made.target) is not None:
            return False
        try:
            type(self.writer)(self.writer.schemes).write(made.target, made.weight, made.bias, made.input)
        except LowbitError as error:
            if error.code != "E0450":
                raise
            return False
        return True

    def _nearest(self, made: ReadModule) -> ReadModule | None:
        """The module with outer scales that the format has, where only they are in the way."""
        found = self.writer.nearest(made.weight, made.input)
        return None if found is None else replace(made, weight=found[0], input=found[1])

    def _plan_dense(self, dtype: str | None) -> None:
        told = dtype or _widest([exact_dtype(module.scheme) for module in self.source.modules])
        self.planned = {module.target.name: Planned(dense(told)) for module in self.source.modules}
        self.writer = DenseWriter(self._schemes(), told, exact=dtype is None)
        self.dtype = told

    def _refuse(self, dtype: str | None) -> None:
        header, form = self.source.header, self.form
        if dtype is not None:
            raise LowbitError("E0104", f"--dtype is for --format dense; {form} keeps every number as it is")
        if form == "gguf" and header.container == "gguf":
            raise LowbitError("E0450", f"--format gguf: {header.root.name} is a GGUF file already")
        floats = all(module.scheme.is_dense for module in self.source.modules)
        if form != "gguf" and floats and self.anew is None:
            raise LowbitError(
                "E0450",
                f"--format {form}: {header.root.name} is not quantized, and convert writes the numbers there "
                "are; --requantize METHOD quantizes it",
            )

    def _schemes(self) -> dict[str, Scheme]:
        planned = {
            module.target.stored: self.planned[module.target.name].scheme for module in self.source.modules
        }
        return planned | self.source.beside

    @property
    def method(self) -> str:
        """Of requantizing, complete."""
        return "" if self.anew is None else self.anew.spec.key

    @property
    def is_exact(self) -> bool:
        """Whether the result computes what the source does: weights, inputs and outputs alike."""
        stored = (self.source.form.scheme_of(module.place.module) for module in self.source.modules)
        return not self.rounds and all(
            planned.decision is None
            and not planned.nearest
            and planned.inputs is None
            and scheme.activation == planned.scheme.activation
            and scheme.output is None
            for scheme, planned in zip(
                stored, (self.planned[m.target.name] for m in self.source.modules), strict=True
            )
        )

    def planned_nbytes(self) -> int:
        """Bytes of all modules and vectors, about."""
        modules = ((self.planned[one.target.name].scheme, one.target.shape) for one in self.source.modules)
        vectors = sum(part.nbytes for part in self.source.parts if isinstance(part, SourceVector))
        return planned_nbytes(modules) + vectors

    def read(self, module: SourceModule, data: TensorData) -> ReadModule:
        """The module as it is written, and on record how its numbers compare with the source's."""
        read = self.source.read(module, data)
        planned = self.planned[module.target.name]
        dense_writer = isinstance(self.writer, DenseWriter)
        multiplier = None if read.input is None else read.input.multiplier
        if dense_writer:
            made = read
            after = Numbers(read.weight, multiplier, self.dtype if self.rounds else None)
        elif planned.decision is not None and self.anew is not None:
            made = self.anew.made(read, self._with_layer(planned.decision, data))
            after = Numbers(made.weight)
        else:
            made = as_written(read, planned.scheme)
            if planned.nearest:
                made = self._nearest(made) or made
            multiplier = None  # stays beside the weight, or is refused by the writer
            after = Numbers(made.weight)
        found = compare(Numbers(read.weight, multiplier), after)
        rounded = self.dtype if dense_writer and self.rounds else None
        told: Json = {
            "name": module.place.part.name,
            "scheme": str(planned.scheme),
            "source_scheme": str(module.scheme),
            "sha256": found.result,
            "beside": beside(made, planned.scheme, rounded),
        }
        if len(made.weight.scales) == 2 and made.weight.scales[1].numel() == 1:
            told["outer_scale"] = float(made.weight.scales[1])
        if not found.equal or planned.nearest:
            if planned.decision is None and not planned.nearest and not rounded:
                raise LowbitError(
                    "E0707",
                    f"{module.target.name}: its numbers changed on the way to {self.form}, by "
                    f"{found.largest:.3g}; nothing was kept. Report it with the model's name",
                )
            told |= {
                "source_sha256": found.source,
                "largest_error": found.largest,
                "largest_relative_error": found.relative,
            }
            if planned.nearest:
                told["rounded"] = "outer scale"
        return replace(made, told=told)

    def _with_layer(self, decision: Decision, data: TensorData) -> Decision:
        """The decision, with the outer scale that the module's layer has, if it has one."""

        def largest(module: SourceModule) -> float:
            read = self.source.read(module, data)
            multiplier = None if read.input is None else read.input.multiplier
            return max(float(rows.abs().max()) for rows in Numbers(read.weight, multiplier).rows())

        if self._layers is None:
            made = ((one, self.planned[one.target.name].decision) for one in self.source.modules)
            self._layers = Layers((one, decided) for one, decided in made if decided is not None)
        return self._layers.decided(decision, largest)

    def vector(self, part: SourceVector, data: TensorData) -> Tensor:
        """A norm's weight; where it loses nothing in the type of a plain model's matrices."""
        tensor = self.source.read_vector(part, data)
        return self.writer.narrowed(tensor) if isinstance(self.writer, DenseWriter) else tensor

    def notes(self) -> list[str]:
        """What does not survive, and what a person must know who loads the result elsewhere."""
        warning = self.writer.warning()
        notes = [warning] if warning else []
        gone = {
            str(module.scheme.activation)
            for module in self.source.modules
            if module.scheme.activation and self.planned[module.target.name].scheme.activation is None
        }
        if gone:
            notes.append(f"inputs are no longer quantized (they were: {'; '.join(sorted(gone))})")
        stored = (self.source.form.scheme_of(module.place.module) for module in self.source.modules)
        rounded = sorted({str(scheme.output) for scheme in stored if scheme.output is not None})
        if rounded:
            notes.append(f"outputs are no longer rounded (they were: {'; '.join(rounded)})")
        limits = {
            (largest_code(one.scheme.activation), largest_code(one.inputs))
            for one in self.planned.values()
            if one.inputs is not None and one.scheme.activation is not None
        }
        for now, before in sorted(limits):
            rule = f"their largest |x| becomes {now:g}, not {before:g}"
            notes.append(f"inputs are quantized by the rule of {self.form}: {rule}")
        latent = [
            module
            for module in self.source.modules
            if module.latent is not None
            and module.scheme.is_dense
            and not all(
                self.source.form.scheme_of(place.module).is_dense for place in (module.place, *module.more)
            )
        ]
        if latent and self.form != "dense":
            notes.append(
                f"{len(latent)} modules like {latent[0].target.name} were written as plain floats: folders "
                "and GGUF files hold K's half of them transposed to each other"
            )
        if self.source.header.container == "gguf":
            architecture = architecture_of(self.source.header)
            if architecture in SEEING.values():
                notes.append("the language model alone: what sees pictures is in a file of its own (mmproj)")
            if architecture == "bitnet":
                notes.append(
                    "inputs are left as they are: GGUF files do not say how a BitNet rounds them (to int8)"
                )
        if self.source.has_kv_scales:
            notes.append("the KV cache's scales were left out")
        return notes + left_out(self.source, self.form)


def _outer_scales_apart(told: Mapping[str, Json]) -> str:
    """What to tell where parts of a layer have outer scales of their own, "" where none do. ``told``: of each
    module, its ``outer_scale`` if it has one (NVFP4)."""
    layers: dict[str, set[object]] = {}
    for one in told.values():
        if "outer_scale" in one:
            layers.setdefault(fused_name(str(one["name"])), set()).add(one["outer_scale"])
    apart = [layer for layer, scales in layers.items() if len(scales) > 1]
    if not apart:
        return ""
    return (
        f"the parts of {len(apart)} layers like {apart[0]} have outer scales of their own: vLLM and SGLang "
        "run them as one matrix and take the largest for all, which are other weights. For them: --format "
        "dense, and --quantization nvfp4 --save-quantized of that"
    )


def _parts(
    work: Work, data: TensorData, known: Collection[str], on_progress: Progress | None
) -> Iterator[Part]:
    done, total = 0, sum(part.nbytes for part in work.source.parts)
    for part in work.source.parts:
        name = part.target.name if isinstance(part, SourceModule) else part.target
        if name not in known:
            yield (
                work.read(part, data)
                if isinstance(part, SourceModule)
                else NamedTensor(part.target, work.vector(part, data))
            )
        done += part.nbytes
        if on_progress is not None:
            on_progress(done, total, "converting")


def _version() -> str:
    from lowbit import __version__

    return __version__


def _widest(names: list[str]) -> str:
    """The narrowest type that holds all of these: bf16 and f16 together need f32."""
    found = set(names)
    return found.pop() if len(found) == 1 else "f32"


def summary(done: Conversion) -> list[str]:
    """What to tell a person, a line each."""
    exact = "every number as it was, read back and compared"
    if done.form == "dense" and done.dtype is not None:
        exact = f"{done.dtype}, exact"
        if done.rounding:
            exact = f"{done.dtype}: largest relative rounding {100 * done.rounding:.2g} %"
    elif done.errors:
        anew, near = len(done.errors) - len(done.rounded), len(done.rounded)
        exact = f"{anew} modules requantized by {done.method}" if anew else ""
        exact += ", " * bool(anew and near) + (f"{near} with rounded outer scales" if near else "")
    lines = [f"{done.out}: {done.form}, {done.modules} modules, {thousands(done.nbytes)} bytes ({exact})"]
    if done.resumed:
        pieces = "tensors" if done.form == "gguf" else "shards"
        lines.append(f"{done.resumed} {pieces} were finished by an earlier run")
    if done.errors and done.form != "dense":
        worst = sorted(done.errors.items(), key=lambda item: -item[1][1])
        for name, (largest, relative) in worst[:MOST_LINES]:
            lines.append(f"{name}: largest error {largest:.3g}, {100 * relative:.2g} % of its row's largest")
        if len(worst) > MOST_LINES:
            lines.append(f"… and {len(worst) - MOST_LINES} more, with smaller ones: see {CERTIFICATE}")
    return lines + done.notes
