"""How each module of a compressed-tensors checkpoint is stored, from config and headers alone.

``Layouts.plan_of`` finds the layout by the names and dtypes of a module's tensors, the arguments by the
config's groups, and checks every shape against both; ``compressed_tensors`` then reads the data by that plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.errors import LowbitError, printable, thousands
from lowbit.formats import Notes, StoredModule, check_shape, entry_of
from lowbit.formats.compressed_tensors_scheme import Args, Config, Group, activation_of
from lowbit.formats.dense import DENSE_DTYPES, is_dense
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme

FLOATS = ("BF16", "F16", "F32")
_E8M0 = ("U8", "F8_E8M0")
_SCALE_NAMES = {**DENSE_DTYPES, "U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
_LAYOUT_FORMATS = {  # what the config may call each layout
    "packed": ("pack-quantized",),
    "int": ("int-quantized", "naive-quantized"),
    "float": ("float-quantized", "naive-quantized", "mxfp8-quantized"),
    "fp4": ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    "fp6": ("mxfp6-pack-quantized",),
    "marlin": ("marlin-24", "pack-quantized"),
}
_ANY_LAYOUT = ("mixed-precision", "dense", "sparse-bitmask", "sparse-24-bitmask")
_CACHED_OUTPUTS = ("k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class Plan:
    """How a quantized module is stored. ``weight``: the suffix of its codes; ``padded``: the old packing."""

    layout: str
    weight: str
    args: Args
    group: Group
    scheme: Scheme
    padded: bool = False


class Layouts:
    """The plans of one checkpoint's modules, each made once."""

    def __init__(self, header: CheckpointHeader, config: Config, notes: Notes) -> None:
        self.header = header
        self.config = config
        self.notes = notes
        self._plans: dict[tuple[str, tuple[int, int]], Plan | None] = {}

    def plan_of(self, module: StoredModule) -> Plan | None:
        """How the module is quantized, or None where it is not; every check the header allows, once."""
        key = (module.stored, module.shape)
        if key not in self._plans:
            self._plans[key] = self._make_plan(module)
        return self._plans[key]

    def _make_plan(self, module: StoredModule) -> Plan | None:
        found = self._layout(module)
        if found is None:
            return None
        layout, suffix = found
        one_by_one = layout == "marlin" or suffix == "compressed"
        if module.transposed or (module.expert is not None and one_by_one):
            raise LowbitError(
                "E0218",
                f"{self.header.root.name}: {module.name} is a stack of quantized experts in an order "
                "that lowbit does not read; use a version with one module for each expert (llm-compressor)",
            )
        group = self._group_of(module)
        args = self._checked_args(module, layout, group)
        padded = self._check_codes(module, layout, suffix, args)
        zero = layout in ("packed", "int") and not args.symmetric
        name = args.number_name if not zero else f"u{args.number_name}"
        blocks, scales = self._scale_levels(module, layout, args)
        scheme = Scheme(
            number_format(name),
            blocks,
            tuple(number_format(_SCALE_NAMES[dtype]) for dtype in scales),
            zero="integer" if zero else "none",
            reordered=module.tensor("weight_g_idx") in self.header.tensors,
            activation=activation_of(group, self.config.place, module.name),
        )
        if zero:
            self.zero_entry(module, args, padded)
        return Plan(layout, suffix, args, group, scheme, padded)

    def _layout(self, module: StoredModule) -> tuple[str, str] | None:
        """(layout, suffix of the codes), or None for plain and for sparse floats."""
        if self._has(module, "weight_packed"):
            entry = entry_of(self.header, module, "weight_packed", ("I32", "U8"), "compressed-tensors")
            if self._has(module, "scale_packed"):
                return "marlin", "weight_packed"
            if entry.dtype == "I32":
                return "packed", "weight_packed"
            quarters = entry.shape[-1] * 4 if entry.shape else 0
            return ("fp6" if quarters == module.shape[1] * 3 else "fp4"), "weight_packed"
        suffix = "weight"
        if self.is_sparse(module):
            suffix = "compressed"
            entry = self.sparse_entry(module)
        elif not self._has(module, "weight"):
            raise LowbitError(
                "E0209",
                f"{self.header.root.name}: no file contains {module.tensor('weight')!r}, nor "
                f"{module.tensor('weight_packed')!r} (compressed-tensors)",
            )
        elif is_dense(self.header, module):
            return None
        else:
            entry = entry_of(self.header, module, "weight", ("I8", "F8_E4M3"), "compressed-tensors")
        if entry.dtype in DENSE_DTYPES:
            return None
        return ("int" if entry.dtype == "I8" else "float"), suffix

    def _has(self, module: StoredModule, suffix: str) -> bool:
        return module.tensor(suffix) in self.header.tensors

    def is_sparse(self, module: StoredModule) -> bool:
        """Whether the weight is stored as values and a bit mask."""
        return self._has(module, "bitmask") and not self._has(module, "weight")

    def _group_of(self, module: StoredModule) -> Group:
        """The config group of a module the file stores quantized, whatever the ignore list says."""
        names = tuple(dict.fromkeys((module.stored, module.name)))
        group, evidence = self.config.group_of(names), "no config group targets it"
        if group is not None and self.config.ignored(names):
            evidence = "the ignore list names it"
        elif group is not None and group.weights is not None:
            self._refuse_outputs(module, group)
            return group
        if group is None or group.weights is None:
            candidates = self.config.quantizing()
            if len(candidates) != 1:
                raise LowbitError(
                    "E0212",
                    f"{self.config.place}: {module.name} is stored quantized, but {evidence}, and with "
                    f"{len(candidates)} quantizing groups it cannot be told how. Add it to a group's targets",
                )
            group = candidates[0]
        self.notes.contradiction(
            "E0214",
            f"{self.config.place}: {module.name} is stored quantized, but {evidence}; reading it as "
            f"{printable(group.name, 40)} ({group.weights})",
        )
        self._refuse_outputs(module, group)
        return group

    def _refuse_outputs(self, module: StoredModule, group: Group) -> None:
        """Quantized outputs, but those of k and v: old files store the KV cache's scales so."""
        leaf = module.stored.rpartition(".")[2]
        if group.outputs and leaf not in _CACHED_OUTPUTS:
            raise LowbitError(
                "E0218",
                f"{self.config.place}.config_groups.{printable(group.name, 40)}: {module.name} wants "
                "its output quantized, which lowbit does not do. Use another quantization of the same model",
            )

    def _checked_args(self, module: StoredModule, layout: str, group: Group) -> Args:
        """The group's arguments, corrected by what the stored dtype proves."""
        args, told = group.weights, group.format or self.config.format
        assert args is not None, "_group_of returns groups that quantize weights"
        allowed = _LAYOUT_FORMATS[layout]
        if told not in allowed and told not in _ANY_LAYOUT:
            self.notes.contradiction(
                "E0214",
                f"{self.config.place}: {module.name} is to be {told}, but its tensors are stored as "
                f"{allowed[0]}; reading what is stored",
            )
        expected = {"fp4": ("float", 4), "fp6": ("float", 6), "float": ("float", 8)}.get(layout)
        if expected is None:
            wrong = args.kind != "int" or (
                layout == "marlin" and (args.bits not in (4, 8) or not args.symmetric)
            )
        else:
            wrong = (args.kind, args.bits) != expected
        if not wrong:
            return args
        if layout in ("int", "float") and args.bits == 8:  # I8 and F8_E4M3 cannot be confused
            self.notes.contradiction(
                "E0214",
                f"{self.config.place}: {module.name} is to be {args}, but its weight is stored as "
                f"{'I8' if layout == 'int' else 'F8_E4M3'}; reading what is stored",
            )
            return replace(args, kind="int" if layout == "int" else "float", symmetric=True)
        entry = self.header.tensors[
            module.tensor("weight" if layout in ("int", "float") else "weight_packed")
        ]
        raise LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, which is not "
            f"how {args} of {self.config.place}.config_groups.{printable(group.name, 40)} is stored",
        )

    def _check_codes(self, module: StoredModule, layout: str, suffix: str, args: Args) -> bool:
        """Whether the old, padded packing is used; E0213 where the codes have a wrong shape."""
        out, columns = module.shape
        what = f"{args} with {thousands(columns)} input columns"
        entry = self.header.tensors[module.tensor(suffix)]
        shape = self._own_shape(module, entry)
        if suffix == "compressed":
            check_shape(self.entry(module, "bitmask", ("U8",), what), (out, -(-columns // 8)), what)
            return False
        if layout == "packed":
            return self._is_padded(module, entry, shape, args)
        if layout == "marlin":
            self._check_marlin(module, args)
            return False
        per_row = {"int": columns, "float": columns, "fp4": columns // 2, "fp6": columns * 3 // 4}[layout]
        exact = columns % {"fp4": 2, "fp6": 4}.get(layout, 1) == 0
        if shape != (out, per_row) or not exact:
            check_shape(entry, self.stacked(module, (out, per_row)), what)
        return False

    def _is_padded(
        self, module: StoredModule, entry: TensorEntry, shape: tuple[int, ...], args: Args
    ) -> bool:
        """Which of the two packings of 3-, 5-, 6- and 7-bit codes has the shapes that are stored."""
        out, columns = module.shape
        dense_words, padded_words = -(-columns * args.bits // 32), -(-columns // (32 // args.bits))
        fits = [shape == (out, dense_words), shape == (out, padded_words)]
        if fits == [False, False]:
            either = "" if dense_words == padded_words else f" (before 0.17: {padded_words} words a row)"
            what = f"{args} with {thousands(columns)} input columns{either}"
            check_shape(entry, self.stacked(module, (out, dense_words)), what)
        if 32 % args.bits == 0 or fits != [True, True]:
            return fits == [False, True]
        zeros = self.header.tensors.get(module.tensor("weight_zero_point"))
        dense_words, padded_words = -(-out * args.bits // 32), -(-out // (32 // args.bits))
        if zeros is not None and zeros.dtype == "I32" and dense_words != padded_words:
            return self._own_shape(module, zeros)[:1] == (padded_words,)
        return self.config.version < (0, 17)

    def _check_marlin(self, module: StoredModule, args: Args) -> None:
        out, columns = module.shape
        what = f"marlin-24 {args} with {thousands(columns)} input columns"
        if columns % 32 or out % 64:
            raise LowbitError("E0213", f"{module.name}: {what} and {out} rows; not in blocks of 32 and 64")
        packed = self.header.tensors[module.tensor("weight_packed")]
        check_shape(packed, (columns // 32, out * args.bits // 2), what)
        check_shape(self.entry(module, "meta", ("I16",), what), (columns // 32, out * 2), what)

    def _scale_levels(
        self, module: StoredModule, layout: str, args: Args
    ) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
        """(blocks, dtypes) of the scales, inner level first."""
        suffix = "scale_packed" if layout == "marlin" else "weight_scale"
        allowed: tuple[str, ...] = FLOATS
        if layout in ("fp4", "fp6", "float"):
            allowed += _E8M0
        if layout == "fp4":
            allowed += ("F8_E4M3",)
        entry = self.entry(module, suffix, allowed, f"compressed-tensors {args}")
        block = self._block_of(module, entry, args, layout)
        if layout != "fp4" or entry.dtype in _E8M0:
            return (block,), (entry.dtype,)
        if args.strategy != "tensor_group" and not self._has(module, "weight_global_scale"):
            return (block,), (entry.dtype,)
        outer = self.entry(module, "weight_global_scale", FLOATS, f"compressed-tensors {args}")
        self.check_one(module, outer)
        return (block, (0, 0)), (entry.dtype, "F32")

    def _block_of(self, module: StoredModule, entry: TensorEntry, args: Args, layout: str) -> tuple[int, int]:
        """The (rows, columns) of one scale; its stored shape must be what the strategy says."""
        out, columns = module.shape
        shape = self._own_shape(module, entry)
        what = f"{args} with {thousands(columns)} input columns"
        if args.strategy == "tensor":
            self.check_one(module, entry)
            return (0, 0)
        if args.strategy == "block":
            rows, width = args.block
            if shape != (-(-out // rows), -(-columns // width)):
                check_shape(entry, self.stacked(module, (-(-out // rows), -(-columns // width))), what)
            return args.block
        groups = 1 if args.strategy == "channel" else -(-columns // args.group)
        expected = (groups, out) if layout == "marlin" else (out, groups)
        if shape != expected and not (groups == 1 and shape == (out,)):
            check_shape(entry, self.stacked(module, expected), what)
        whole = args.strategy == "channel" or (groups == 1 and args.kind == "int")
        return (1, 0) if whole else (1, args.group)

    def zero_entry(self, module: StoredModule, args: Args, padded: bool) -> TensorEntry:
        """The zero points: packed along *out* beside packed weights, else one I8 beside each scale."""
        out = module.shape[0]
        what = f"compressed-tensors {args}"
        entry = self.entry(module, "weight_zero_point", ("I8", "I32"), what)
        scale = self.header.tensors[module.tensor("weight_scale")]
        if entry.dtype == "I8":
            check_shape(entry, scale.shape, what)
            return entry
        words = -(-out // (32 // args.bits)) if padded else -(-out * args.bits // 32)
        groups = self._own_shape(module, scale)[-1] if args.strategy != "channel" else 1
        check_shape(entry, self.stacked(module, (words, groups)), what)
        return entry

    def entry(self, module: StoredModule, suffix: str, dtypes: tuple[str, ...], what: str) -> TensorEntry:
        """A tensor the module must have; ``what`` says why, for the message."""
        return entry_of(self.header, module, suffix, dtypes, what)

    def sparse_entry(self, module: StoredModule) -> TensorEntry:
        """The kept values of a sparse weight."""
        return self.entry(module, "compressed", (*FLOATS, "I8", "F8_E4M3"), "a sparse weight")

    def _own_shape(self, module: StoredModule, entry: TensorEntry) -> tuple[int, ...]:
        """The shape of the module's slice of a stack of experts; any other shape as it is."""
        if module.expert is None:
            return entry.shape
        if not entry.shape or entry.shape[0] != module.experts:
            check_shape(entry, (module.experts, *entry.shape[1:]), f"a stack of {module.experts} experts")
        return entry.shape[1:]

    def stacked(self, module: StoredModule, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor as stored: of all experts where they are stacked."""
        return shape if module.expert is None else (module.experts, *shape)

    def check_one(self, module: StoredModule, entry: TensorEntry) -> None:
        """A single number, however many axes it is stored with."""
        if any(size != 1 for size in self._own_shape(module, entry)):
            check_shape(entry, self.stacked(module, (1,)), "a scale for the whole tensor")
