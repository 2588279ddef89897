"""quantized_checkpoint: a float checkpoint quantized by a recipe, as a checkpoint of its own.

What ``--save-quantized`` leaves behind, and what a calibrated method is loaded from: then the folder lies in
the cache under a hash of the model, the text and the options, and the next start is a plain load. Modules are
read, quantized and written one after another; calibration adds one decoder block and its inputs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.embedded import cache_directory
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.safetensors_writer import SHARD_BYTES
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.gptq_writer import GptqWriter
from lowbit.formats.writing import CheckpointWriter, writer_of
from lowbit.loading.calibrate import Calibrated, calibrate
from lowbit.loading.gguf_saving import save_gguf
from lowbit.loading.names import Names, row_order
from lowbit.loading.online import Decision, Layers, Online, facts_of
from lowbit.loading.opened import Opened
from lowbit.loading.saving import NamedTensor, Part, digest_of, left_out, planned_nbytes, save_checkpoint
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule, SourceVector
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.calibrated import options_of
from lowbit.quantize.calibration import (
    CalibratedModule,
    Calibration,
    CalibrationOptions,
    calibration_sequences,
)
from lowbit.quantize.method import largest_weight
from lowbit.quantize.recipe import Recipe
from lowbit.quantize.specification import TORCHAO, MethodSpec
from lowbit.tokenization import load_tokenizer

_log = logging.getLogger("lowbit")

Progress = Callable[[int, int, str], None]

VERSION = 2  # of what a cached result depends on beside its inputs: raised when numerics change
_SAMPLE = 4096
# The format a method's users expect its checkpoints in; the first that can hold everything exactly is taken.
_FORMATS: dict[str, tuple[str, ...]] = {
    "fp8": ("fp8", "compressed-tensors"),
    "w8a8_fp8": ("w8a8_fp8", "compressed-tensors"),
    "w8a8_int8": ("w8a8_int8", "compressed-tensors"),
    "blockwise_int8": ("blockwise_int8", "compressed-tensors"),
    "bitsandbytes": ("bitsandbytes",),
    "nf4": ("bitsandbytes",),
    "fp4": ("bitsandbytes",),
    "gguf": ("gguf",),
    "hqq": ("hqq",),
    # AWQ's files have one group size; layers whose columns need different ones go where each has its own.
    **dict.fromkeys(("awq", "awq_marlin"), ("awq", "compressed-tensors")),
    **dict.fromkeys(("gptq", "gptq_marlin", "marlin"), ("gptq", "compressed-tensors")),
}
_FORMATS |= dict.fromkeys(TORCHAO, ("torchao",))
_USUAL = ("compressed-tensors", "gptq")


@dataclass(frozen=True)
class _Module:
    """A module as it will be written. ``source``: where its floats are, if it is not from calibration.

    ``order``: which of the model's rows, as calibration gives them, each written one is, where these come in
    another order.
    """

    target: StoredModule
    scheme: Scheme
    source: SourceModule | None = None
    decision: Decision | None = None
    order: Tensor | None = None


class Quantizing:
    """A float checkpoint and what a recipe makes of it."""

    def __init__(self, opened: Opened, recipe: Recipe, calibration: Calibration) -> None:
        self.opened, self.recipe, self.calibration = opened, recipe, calibration
        self.source = SourceModel(opened.header, strict=opened.strict)
        names = Names(opened.header, opened.family, opened.config.layers, opened.form.unused)
        self.online = Online(recipe, names, facts_of(opened.config), opened.strict)
        calibrated = [spec for spec in recipe.methods if spec.entry.calibrated]
        if len(calibrated) > 1:
            raise LowbitError(
                "E0405",
                f"{recipe.described} uses {calibrated[0].text} and {calibrated[1].text}; one calibrated "
                "method a model",
            )
        self.calibrated: MethodSpec | None = calibrated[0] if calibrated else None
        if self._forms() == ("gguf",):
            self.source = self.source.for_gguf()
        self.modules = [module for part in self._sources() for module in self._planned(part)]
        self.instead_of = ""  # the format that the method's users expect, and why it is another
        self._layers = Layers(
            (one, one.decision) for one in self.modules if one.source is not None and one.decision is not None
        )

    def _sources(self) -> list[SourceModule]:
        """What there is to write. In a layer of which an expert of a stack is quantized, all of them become
        modules of their own, as in llm-compressor's checkpoints: but for GGUF the formats have no stacks."""
        modules = self.source.modules
        if self._forms() == ("gguf",):
            return modules
        decided = [self.online.decide(part.place, part.scheme) for part in modules]
        apart = {
            part.place.part.name.rpartition(".experts.")[0]
            for part, decision in zip(modules, decided, strict=True)
            if part.target.expert is not None and decision.method is not None
        }
        found = []
        for part, decision in zip(modules, decided, strict=True):
            layer = part.place.part.name.rpartition(".experts.")[0]
            if part.target.expert is None or layer not in apart or self._is_calibrated(decision):
                found.append(part)
            else:
                found += part.unstacked(self.source.header)
        return found

    def _planned(self, part: SourceModule) -> list[_Module]:
        decision = self.online.decide(part.place, part.scheme)
        order = row_order(part.place, self.source.header) if part.place.groups else None
        order = part.rows if order is None else order.argsort()
        if not self._is_calibrated(decision):
            return [_Module(part.target, decision.scheme, part, decision, order)]
        if part.more or (part.rows is not None and not part.parts):
            raise self._not_followed(part.target.name)
        if part.target.expert is None:
            return [_Module(part.target, decision.scheme, order=order)]
        # One of a stack of experts: calibrated ones are modules of their own, gate and up apart.
        name, (rows, columns) = part.place.part.name, part.target.shape
        leaves = {"gate_proj": rows // 2, "up_proj": rows // 2}
        shapes = {name: rows}
        if name.endswith("gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            shapes = {f"{stem}{leaf}": count for leaf, count in leaves.items()}
        return [
            _Module(StoredModule(name, part.beside_stack(name), (count, columns)), decision.scheme)
            for name, count in shapes.items()
        ]

    def _not_followed(self, name: str) -> LowbitError:
        return LowbitError(
            "E0450",
            f"{self.source.header.root.name}: {name} lies in other tensors than in a Hugging Face folder, "
            "which calibration does not follow; lowbit convert --format dense makes one to start from",
        )

    def _is_calibrated(self, decision: Decision) -> bool:
        return decision.method is not None and decision.method.spec.entry.calibrated

    def _forms(self) -> tuple[str, ...]:
        """The formats to try, in their order."""
        methods = self.recipe.methods
        return _FORMATS.get(methods[0].name, _USUAL) if len(methods) == 1 else ("compressed-tensors",)

    def writer(self) -> CheckpointWriter:
        """The first format that can hold every module exactly."""
        schemes = {module.target.stored: module.scheme for module in self.modules} | self.source.beside
        methods, wanted = self.recipe.methods, self._forms()
        decisions = [one.decision for one in self.modules if one.decision is not None]
        if wanted != ("gguf",) and len(decisions) == len(self.modules):  # none is calibrated
            self.online.refuse_nothing(decisions, self.recipe.described, self.source.header.root.name)
        if any(spec.options.get("weights") in ("channel", "tensor") for spec in methods):
            # Every tool reads it there. fbgemm_fp8 is read by transformers on a GPU only, and what it calls
            # scales of tensors by vLLM and SGLang in few families.
            wanted = wanted[-1:]
        reasons: list[str] = []
        for form in wanted:
            kind = writer_of(form)
            reason = next(filter(None, (self._refusal(kind, module) for module in self.modules)), None)
            if reason is None:
                try:
                    made = kind(schemes)
                    made.quantization_config()  # what cannot be said of the whole is found out here
                    reason = self._misfit(made)
                    if reason is None:
                        if isinstance(made, GptqWriter) and self.calibrated is not None:
                            made.made = _how_made(options_of(self.calibrated))
                        self.instead_of = "; ".join(reasons)
                        return made
                except LowbitError as error:
                    reason = error.message
            reasons.append(f"{form}: {reason}")
        raise LowbitError(
            "E0450",
            f"{self.recipe.described} cannot be saved without changing its numbers: {'; '.join(reasons)}. "
            "Serve it without --save-quantized, or choose another method",
        )

    def _refusal(self, kind: type[CheckpointWriter], module: _Module) -> str | None:
        if module.scheme.is_dense:
            return None
        reason = kind.refuses_to_write(module.scheme, module.target.shape)
        if module.target.expert is not None:
            reason = reason or kind.refuses_module(module.target)
        return None if reason is None else f"{module.target.name}: {reason}"

    def _misfit(self, writer: CheckpointWriter) -> str | None:
        for module in self.modules:
            if (reason := writer.misfit(module.target)) is not None:
                return f"{module.target.name}: {reason}"
        return None

    def write(
        self,
        out: Path,
        *,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
        on_progress: Progress | None = None,
    ) -> Path:
        """Quantize into ``out``, which appears complete or not at all; the path to open."""
        writer = self.writer()
        if writer.name == "gguf":
            return self._write_gguf(out, writer, force, on_progress)
        schemes = ((module.scheme, module.target.shape) for module in self.modules)
        vectors = sum(part.nbytes for part in self.source.parts if isinstance(part, SourceVector))
        with TensorData(self.source.header) as data:
            save_checkpoint(
                out,
                self.source.header,
                self.source.hf_config(data),
                lambda known: self._parts(data, known, on_progress),
                writer,
                nbytes=planned_nbytes(schemes) + vectors,
                tensors=6 * len(self.modules) + len(self.source.parts),
                tokenizer=self._others_tokenizer(),
                force=force,
                shard_bytes=shard_bytes,
                # Calibration starts at the first block again: what it gives comes in one run or not at all.
                journal=None if self.calibrated is not None else Journal(self._depends_on(writer)),
            )
        self.online.say_kept()
        return out

    def _depends_on(self, writer: CheckpointWriter) -> dict[str, str]:
        """What an unfinished output can be gone on with under."""
        digest = hashlib.sha256("\n".join(f"{m.target.stored} {m.scheme}" for m in self.modules).encode())
        return {
            "source": digest_of(self.source.header),
            "--quantization": "; ".join(spec.key for spec in self.recipe.methods),
            "recipe": digest.hexdigest(),
            "format": f"{writer.name}, {VERSION}",
            "--tokenizer": "its own" if (other := self._others_tokenizer()) is None else other.root.name,
        }

    def _others_tokenizer(self) -> CheckpointHeader | None:
        return None if self.source.tokenizer is self.source.header else self.source.tokenizer

    def _write_gguf(
        self, out: Path, writer: CheckpointWriter, force: bool, on_progress: Progress | None
    ) -> Path:
        file = out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")
        planned = {id(module.source): module for module in self.modules}
        with TensorData(self.source.header) as data:

            def read(part: SourceModule) -> ReadModule:
                return self._quantized(planned[id(part)], data)

            saved = save_gguf(
                file,
                self.source,
                writer.schemes,
                read,
                data,
                depends_on=self._depends_on(writer),
                force=force,
                on_progress=on_progress,
            )
        for note in saved.notes:
            _log.warning("lowbit: %s", note)
        self.online.say_kept()
        return file

    def _quantized(self, module: _Module, data: TensorData) -> ReadModule:
        assert module.source is not None and module.decision is not None, "not from calibration"

        def largest(one: _Module) -> float:
            assert one.source is not None, "listed by it"
            return largest_weight(self.source.read(one.source, data).weight.codes)

        found = self.source.read(module.source, data)
        return self._made(replace(module, decision=self._layers.decided(module.decision, largest)), found)

    def _made(self, module: _Module, found: ReadModule) -> ReadModule:
        """The floats ``found`` as the recipe decided."""
        assert module.decision is not None, "not from calibration"
        made = self.online.quantize(module.decision, found.weight)
        rule = None if made.static_scale is None else InputRule(static_scale=made.static_scale)
        return replace(found, weight=made.weight, input=rule)

    def _calibrated_part(self, module: _Module, found: CalibratedModule) -> ReadModule:
        """What calibration gave, rows as they are written. Of a module that is not its own it gives floats,
        because they took over a scale; another method of the recipe quantizes these."""
        weight, bias = found.weight, found.bias
        if module.order is not None:
            weight = weight.permute_rows(module.order)
            bias = None if bias is None else bias[module.order]
        read = ReadModule(module.target, weight, bias)
        if module.decision is None or module.decision.method is None:
            return read
        return self._made(module, read)

    def _parts(
        self, data: TensorData, known: Collection[str], on_progress: Progress | None
    ) -> Iterator[Part]:
        """Calibrated modules as they come, then everything else but what is ``known``."""
        vectors = {part.name: part for part in self.source.parts if isinstance(part, SourceVector)}
        rest = {module.target.name: module for module in self.modules}
        if self.calibrated is not None:
            for found in self._calibrated(self.calibrated, on_progress):
                if isinstance(found, CalibratedModule):
                    if found.name not in rest:
                        raise self._not_followed(found.name)
                    yield self._calibrated_part(rest.pop(found.name), found)
                else:
                    yield NamedTensor(vectors.pop(found.name).target, found.tensor)
        total = sum(module.source.nbytes for module in rest.values() if module.source is not None)
        done = 0
        for vector in vectors.values():
            if vector.target in known:
                continue
            yield NamedTensor(vector.target, self.source.read_vector(vector, data))
        for module in rest.values():
            if module.target.name not in known:
                yield self._quantized(module, data)
            if on_progress is not None and module.source is not None:
                done += module.source.nbytes
                on_progress(done, total, "quantizing")

    def _calibrated(self, spec: MethodSpec, on_progress: Progress | None) -> Iterator[Calibrated]:
        planned = {module.target.name for module in self.modules if module.source is None}
        sequences = self._sequences(spec)
        lengths = sum(map(len, sequences))
        _log.info("lowbit: %s on %d tokens of calibration text", spec.text, lengths)
        nbytes = self.source.header.nbytes

        def blocks(done: int, total: int, what: str) -> None:
            if on_progress is not None:
                on_progress(nbytes * done // total, nbytes, f"calibrating {spec.name}")

        return calibrate(
            self.source.header,
            sequences,
            options_of(spec),
            keep=lambda name: name not in planned,
            on_progress=blocks,
        )

    def _sequences(self, spec: MethodSpec) -> list[list[int]]:
        tokenizer = load_tokenizer(self.source.header, self.calibration.tokenizer)
        count, length = spec.options["sequences"], spec.options["length"]
        assert isinstance(count, int) and isinstance(length, int), "checked by the specification"
        return calibration_sequences(
            partial(tokenizer.encode, add_special=False),
            self.calibration.file,
            count=count,
            length=length,
            context_length=self.source.config.context_length,
            first=tokenizer.bos_id if tokenizer.adds_bos else None,
        )

    def key(self) -> str:
        """What the result depends on, as a name: weights, config, recipe, text."""
        digest = hashlib.sha256()
        decisions = [f"{module.target.stored} {module.scheme}" for module in self.modules]
        told = [str(VERSION), *(spec.key for spec in self.recipe.methods), *decisions]
        digest.update("\n".join(told).encode())
        digest.update(repr(sorted(self.source.header.config.items(), key=str)).encode())
        if self.calibrated is not None:
            digest.update(repr(self._sequences(self.calibrated)).encode())
        _digest_weights(digest, self.source.header)
        return digest.hexdigest()[:32]


def _how_made(options: CalibrationOptions) -> dict[str, object]:
    """What a GPTQ checkpoint's config says of how GPTQ was run."""
    return {
        "static_groups": options.static_groups,
        "act_order": options.act_order,
        "damp_percent": options.damp,
    }


def _digest_weights(digest: hashlib._Hash, header: CheckpointHeader) -> None:
    """Every tensor's name, type, shape, and its first, middle and last bytes: enough to tell models apart
    without reading them whole."""
    for name in sorted(header.tensors):
        entry = header.tensors[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}{entry.axes or ''}".encode())
        with entry.file.open("rb") as file:
            for at in (0, max(entry.nbytes // 2 - _SAMPLE // 2, 0), max(entry.nbytes - _SAMPLE, 0)):
                file.seek(entry.start + at)
                digest.update(file.read(min(_SAMPLE, entry.nbytes)))


def quantized_checkpoint(
    opened: Opened,
    *,
    save: Path | None = None,
    calibration: Calibration | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """The quantized checkpoint of an opened float one: in ``save``, or in the cache, made on first use."""
    assert opened.recipe is not None, "something was asked for"
    work = Quantizing(opened, opened.recipe, calibration or Calibration())
    if save is not None:
        if work.calibration.tokenizer is not None:
            work.source.take_tokenizer(open_checkpoint(work.calibration.tokenizer))
        made = work.write(save, on_progress=on_progress)
        _log.info("lowbit: saved as %s", made)
        writer = work.writer()
        instead = f"it is a {writer.name} checkpoint ({work.instead_of})" if work.instead_of else ""
        for warning in filter(None, (instead, writer.warning(), *left_out(work.source, writer.name))):
            _log.warning("lowbit: %s", warning)
        return made
    folder = cache_directory() / "quantized" / work.key()
    if folder.exists():
        _log.info("lowbit: %s was quantized before: %s", opened.header.root.name, folder)
        return folder
    return work.write(folder, on_progress=on_progress)
