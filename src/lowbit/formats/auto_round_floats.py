"""AutoRound's MX and NVFP4 layers: the tensors of compressed-tensors, a rule for each module.

    data_type    bits   act_data_type                      act_bits   inputs
    mx_fp        4, 8   mx_fp, mx_fp_rceil                 4, 8, 16   32 columns a power of two
    nv_fp, …     4      nv_fp4_with_static_gs, …           4, 16      NVFP4's, in groups of 16

A power of two is that of the largest |x|, never one more, where compressed-tensors counts one near the next
power as that; ``_rceil``: the least with which nothing saturates. Where modules have rules of their own
(``extra_config``), each rule is a config of compressed-tensors and a reader: in one config patterns would be
tried in alphabetical order, not in AutoRound's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.gptq import read_number
from lowbit.numerics.scheme import Scheme

_NV = ("nv_fp", "nv_fp4", "nv_fp4_with_static_gs")
# (kind, bits) -> (compressed-tensors format, strategy, columns of a group)
_FORMATS = {
    ("mx_fp", 4): ("mxfp4-pack-quantized", "group", 32),
    ("mx_fp", 8): ("mxfp8-quantized", "group", 32),
    ("nv_fp", 4): ("nvfp4-pack-quantized", "tensor_group", 16),
}
_LARGEST = {4: 6.0, 8: 448.0}  # codes of e2m1 and e4m3


@dataclass(frozen=True)
class FloatRule:
    """What a module's weight and inputs are. ``kind``: "" where it is left alone; ``act_bits`` 16: as are its
    inputs; ``rceil``: how their powers of two are rounded."""

    kind: str
    bits: int = 16
    act_bits: int = 16
    rceil: bool = False

    @staticmethod
    def of(values: dict[str, object], place: str) -> FloatRule:
        """From the config's keys and those of a module's own rule; E0218 where lowbit does not read it."""
        bits = read_number(values, place, "bits")
        if bits > 8:
            return FloatRule("")
        kind, _ = _kind(values, place, "data_type", bits)
        act_bits = 16 if values.get("act_bits") is None else read_number(values, place, "act_bits")
        rceil = False
        if act_bits < 16:
            told = {"act_data_type": values.get("act_data_type") or kind}
            inputs, rceil = _kind(told, place, "act_data_type", act_bits)
            if inputs != kind:
                raise LowbitError(
                    "E0218", f"{place}: inputs of {inputs} beside weights of {kind} are not read; {_WAY_OUT}"
                )
        for key in ("group_size", "act_group_size"):
            group, wanted = values.get(key), _FORMATS[kind, bits][2]
            needed = key == "group_size" or (act_bits < 16 and group is not None)
            if needed and (group != wanted or isinstance(group, bool)):
                raise LowbitError(
                    "E0218",
                    f"{place}.{key} is {printable(repr(group))}; {kind} has groups of {wanted}. {_WAY_OUT}",
                )
        return FloatRule(kind, bits, act_bits, rceil)

    def config(self, ignore: list[str]) -> dict[str, object]:
        """The config compressed-tensors would have written for the same tensors."""
        written: dict[str, object] = {"quant_method": "compressed-tensors", "config_groups": {}}
        if not self.kind:
            return written
        form, strategy, columns = _FORMATS[self.kind, self.bits]
        weights: dict[str, object] = {
            "num_bits": self.bits, "type": "float", "strategy": strategy, "group_size": columns,
            "symmetric": True,
        }  # fmt: skip
        if strategy == "group":
            weights["scale_dtype"] = "torch.uint8"
        dynamic: object = "local" if strategy == "tensor_group" else True
        inputs = {**weights, "num_bits": self.act_bits, "dynamic": dynamic} if self.act_bits < 16 else None
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return {**written, "format": form, "config_groups": {"group_0": group}, "ignore": ignore}

    def own_inputs(self, scheme: Scheme) -> Scheme:
        """The scheme of compressed-tensors with AutoRound's rule for the exponents of inputs."""
        inputs = scheme.activation
        if inputs is None or not inputs.round_up:
            return scheme
        limit = _LARGEST[self.act_bits] if self.rceil else 0.0
        return replace(scheme, activation=replace(inputs, round_up=0.0, limit=limit))


_WAY_OUT = "use another quantization of the same model"


def _kind(values: dict[str, object], place: str, key: str, bits: int) -> tuple[str, bool]:
    """("mx_fp" or "nv_fp", whether powers of two are rounded up)."""
    told = str(values.get(key, "")).lower()
    plain = told.removesuffix("_rceil")
    kind = "mx_fp" if plain in ("mx_fp", f"mx_fp{bits}") else "nv_fp" if told in _NV else ""
    if (kind, bits) not in _FORMATS:
        raise LowbitError(
            "E0218",
            f"{place}.{key} {printable(repr(told))} of {bits} bits in llm_compressor packing is not read; "
            f"{_WAY_OUT}",
        )
    return kind, plain != told


class FloatLayers:
    """The modules of one checkpoint, each read by the config of its own rule."""

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        self._readers: dict[tuple[FloatRule, bool], CompressedTensors] = {}

    def reader(self, rule: FloatRule, told: bool) -> CompressedTensors:
        """``told``: whether it is a rule of single modules. The one of all others leaves the head alone."""
        if (rule, told) not in self._readers:
            config = {**self.header.config, "quantization_config": rule.config([] if told else ["lm_head"])}
            self._readers[rule, told] = CompressedTensors(replace(self.header, config=config), self.notes)
        return self._readers[rule, told]
