"""What becomes of each module when a checkpoint is converted: exact where the format can, else by a method.

``--requantize`` names a method of ``quantize.specification``; without a name it is the one a format's users
expect. Only what the format cannot hold is quantized anew, from the floats it stands for; embeddings, the
head and tiny layers become plain floats, as a recipe leaves them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from lowbit.errors import LowbitError
from lowbit.formats import InputRule
from lowbit.formats.gguf_writer import GgufWriter
from lowbit.formats.respelling import plain, respelled, spelled_out
from lowbit.formats.writing import EMBEDDINGS, CheckpointWriter, cannot
from lowbit.loading.names import Names
from lowbit.loading.online import Decision, Online, facts_of
from lowbit.loading.proof import Numbers
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense
from lowbit.quantize.recipe import Recipe
from lowbit.quantize.specification import MethodSpec, parse_method

# {bits}: those of most of the source's integers; {symmetric}: whether most modules have no zero points.
_USUAL = {
    "awq": "rtn:bits=4",
    "bitsandbytes": "nf4",
    "blockwise_int8": "blockwise_int8",
    "compressed-tensors": "rtn:bits={bits},symmetric={symmetric}",
    "fp8": "fp8:weights=block",
    "gguf": "gguf",
    "gptq": "rtn:bits={bits},symmetric={symmetric}",
    "hqq": "hqq",
    "mlx": "rtn:bits=4",
    "modelopt": "nvfp4",
    "mxfp4": "mxfp4",
    "torchao": "int8wo",
    "w8a8_fp8": "w8a8_fp8",
    "w8a8_int8": "w8a8_int8",
}


@dataclass(frozen=True)
class Planned:
    """``scheme``: as written. ``decision``: how it is quantized anew; None: its numbers stay, or
    (``nearest``) are those next to them that the format has: an outer scale is rounded. ``inputs``: how the
    module's inputs were quantized, where the format has only a rule near that one."""

    scheme: Scheme
    decision: Decision | None = None
    nearest: bool = False
    inputs: ActivationScheme | None = None


class Requantizing:
    """A method for what the format cannot hold."""

    def __init__(self, source: SourceModel, kind: type[CheckpointWriter], method: str) -> None:
        self.source, self.kind = source, kind
        self.spec = method_for(source, kind.name, method)
        self.online = self._online()
        self.from_floats = all(module.scheme.is_dense for module in source.modules)

    def _online(self) -> Online:
        source = self.source
        names = Names(source.header, source.family, source.config.layers, source.form.unused)
        return Online(Recipe.of(self.spec), names, facts_of(source.config))

    def choose_one_group(self, planned: list[Planned]) -> bool:
        """Where each module has the group that fits its columns: all get the smallest of them."""
        sizes = {one.scheme.blocks[0][1] for one in planned if one.decision is not None and one.scheme.blocks}
        sizes.discard(0)
        if self.spec.options.get("group_size", 0) is not None or len(sizes) < 2:
            return False
        self.spec = replace(self.spec, options={**self.spec.options, "group_size": min(sizes)})
        self.online = self._online()
        return True

    def planned(self, module: SourceModule, *, all_anew: bool = False) -> Planned:
        """Exact, by the method, or plain."""
        scheme = module.scheme
        if scheme.is_dense and not self.from_floats:
            return Planned(scheme)
        if not scheme.is_dense and not all_anew:
            held = scheme if self.kind is GgufWriter else spelled_out(scheme)
            if refusal(self.kind, module, held) is None:
                return Planned(held)
            near = self.kind.nearest_inputs(held)
            if near is not None and refusal(self.kind, module, near) is None:
                return Planned(near, inputs=held.activation)
        reason = self.kind.refuses_module(module.target)
        if reason is not None and module.target.expert is not None:
            raise cannot(self.kind.name, module.target, reason)
        stored = scheme if scheme.is_dense else dense("f32")
        decision = self.online.decide(module.place, stored)
        if reason is not None or decision.method is None:
            return Planned(plain(scheme))
        if (reason := self.kind.refuses_to_write(decision.scheme, module.target.shape)) is not None:
            near = self.kind.nearest_inputs(decision.scheme)
            if near is not None and self.kind.refuses_to_write(near, module.target.shape) is None:
                return Planned(near, replace(decision, scheme=near), inputs=decision.scheme.activation)
            raise LowbitError(
                "E0450",
                f"--requantize {self.spec.text}: {module.target.name} becomes {decision.scheme}, which "
                f"{self.kind.name} cannot hold: {reason}. Name another method, --requantize METHOD",
            )
        return Planned(decision.scheme, decision)

    def refuse_nothing(self) -> None:
        """E0403: no module was quantized, nor can be."""
        stored = ((one, one.scheme if one.scheme.is_dense else dense("f32")) for one in self.source.modules)
        decisions = (self.online.decide(one.place, scheme) for one, scheme in stored)
        what = f"--requantize {self.spec.text}"
        self.online.refuse_nothing(decisions, what, self.source.header.root.name)

    def made(self, read: ReadModule, decision: Decision) -> ReadModule:
        """The module quantized anew, from its floats times what its input is multiplied by."""
        multiplier = None if read.input is None else read.input.multiplier
        floats = read.weight
        if not floats.scheme.is_dense or multiplier is not None:
            whole = Numbers(read.weight, multiplier).whole()
            floats = QuantizedTensor(dense("f32"), read.weight.shape, whole, origin=read.weight.origin)
        made = self.online.quantize(decision, floats)
        rule = None if made.static_scale is None else InputRule(static_scale=made.static_scale)
        return replace(read, weight=made.weight, input=rule)


def method_for(source: SourceModel, form: str, method: str) -> MethodSpec:
    """The method asked for, or the format's usual one where ``method`` is ""; E0405 where it needs text."""
    if not method and form not in _USUAL:
        raise LowbitError("E0405", f"--requantize: {form} has no usual method; name one, --requantize METHOD")
    bits = Counter(
        int(module.scheme.weight.bits)
        for module in source.modules
        if module.scheme.weight.is_integer and module.scheme.weight.bits in (2, 3, 4, 8)
    )
    usual = bits.most_common(1)[0][0] if bits else 4
    schemes = [module.scheme for module in source.modules if not module.scheme.is_dense]
    asymmetric = sum(scheme.offset or scheme.zero != "none" for scheme in schemes)
    symmetric = "false" if 2 * asymmetric > len(schemes) else "true"
    told = method or _USUAL[form].format(bits=usual, symmetric=symmetric)
    spec = parse_method(told, "--requantize")
    if spec.entry.calibrated or spec.name == "auto":
        raise LowbitError(
            "E0405",
            f"--requantize {spec.text}: it needs more than the weights; quantize the original model with "
            "--quantization and --save-quantized, or name a method like rtn",
        )
    return spec


def refusal(kind: type[CheckpointWriter], module: SourceModule, scheme: Scheme) -> str | None:
    """Why the format cannot hold the module's numbers in ``scheme``."""
    return kind.refuses_module(module.target) or kind.refuses_to_write(scheme, module.target.shape)


def exact(kind: type[CheckpointWriter], module: SourceModule) -> Planned:
    """The scheme in which ``kind`` holds the module's numbers; E0450 where there is none.

    Embeddings and heads that it cannot hold are written as plain floats, as most checkpoints have them.
    """
    scheme = module.scheme if kind is GgufWriter else spelled_out(module.scheme)
    reason = None if scheme.is_dense else refusal(kind, module, scheme)
    if reason is None:
        return Planned(scheme)
    if module.place.part.name.rpartition(".")[2] in (*EMBEDDINGS, "lm_head"):
        return Planned(plain(scheme))
    raise cannot(kind.name, module.target, reason)


def as_written(read: ReadModule, scheme: Scheme) -> ReadModule:
    """The module in the scheme it is planned in, its numbers as they are."""
    weight = respelled(read.weight, scheme)
    if scheme.activation is not None and weight.scheme.activation != scheme.activation:
        weight = replace(weight, scheme=replace(weight.scheme, activation=scheme.activation))
    return replace(read, weight=weight)
