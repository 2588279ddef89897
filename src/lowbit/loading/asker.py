"""What loading, planning and walking a checkpoint share: its names, its target and its parts' places."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats.compressed_tensors_transforms import Transforms
from lowbit.formats.dense import VECTOR_DTYPES
from lowbit.kernels import choose
from lowbit.kernels.rotation import Rotator
from lowbit.layers.cuts import Cut, cut_evenly
from lowbit.layers.experts import ExpertsSpec
from lowbit.layers.linear import Part
from lowbit.loading.kernel_choice import Wanted
from lowbit.loading.names import Names, Placed
from lowbit.loading.online import Decision, Online, facts_of, role_of
from lowbit.loading.opened import Opened, Target
from lowbit.models.registry import HEAD_COPY
from lowbit.numerics.cutting import column_borders, column_unit, row_unit
from lowbit.numerics.int8_inputs import INT8_GROUPS
from lowbit.numerics.lattice import TILE_ROWS
from lowbit.numerics.number_formats import RowVectorLayout, number_format
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

_MANY = 16  # units for each rank: one more or less is then no matter


class Asker:
    """What loading and planning share: names, target and the parts' places."""

    def __init__(self, opened: Opened, target: Target) -> None:
        self.header = opened.header
        self.form = opened.form
        self.target = target
        self.parallel = target.parallel
        self.device = target.device
        self.activation_dtype = target.activation_dtype
        self.cache_dtype = target.cache_dtype
        config = opened.config
        self.tied_head = config.tied_head
        self._last_of_many = f"model.layers.{config.layers - 1}." if config.layers > 1 else None
        unused = (*opened.form.unused, *((HEAD_COPY,) if self.tied_head else ()))
        self.names = Names(opened.header, opened.family, config.layers, unused, config.tied_head)
        self.transforms = Transforms.of(opened.header)
        self.online: Online | None = None
        if opened.recipe is not None:
            self.online = Online(opened.recipe, self.names, facts_of(config), opened.strict)

    def placed(self, name: str, parts: list[Part]) -> list[Placed]:
        """The parts' stored modules and what is here of them, their tensors marked as used."""
        return self._cut([self._taken(place) for place in self.names.place(name, parts)], parts)

    def placed_expert(self, name: str, spec: ExpertsSpec, number: int) -> tuple[list[Placed], list[Placed]]:
        """One expert's gate and up, and its down projection."""
        gate_up, down = self.names.expert(name, spec, number)
        return [self._taken(place) for place in gate_up], [self._taken(place) for place in down]

    def placed_experts(self, name: str, spec: ExpertsSpec) -> list[tuple[list[Placed], list[Placed]]]:
        """Every expert's, and what is here of them: the same share of each."""
        experts = [self.placed_expert(name, spec, number) for number in range(spec.count)]
        if self.parallel.size == 1:
            return experts
        ups, downs = [up for ups, _ in experts for up in ups], [down for _, [down] in experts]
        if why := self._why_whole(ups, downs):
            whole = cut_evenly(self.parallel, spec.count)
            if whole is None:
                raise self._cannot(
                    f"experts like those of {name} ({self.scheme_at(downs[0])}) are whole on a rank, and "
                    f"there are {spec.count}; use --tp-size {spec.count}" + " or less" * (spec.count > 1)
                )
            here, said = range(whole.start, whole.stop), f"whole, experts {whole} ({why})"

            def told(place: Placed, number: int) -> Placed:
                return replace(place, elsewhere=number not in here, whole=said)

            return [
                ([told(up, n) for up in first], [told(last, n)]) for n, (first, [last]) in enumerate(experts)
            ]
        cut = self._inner_ranges(ups, downs)
        return [self._cut_expert(ups, down, cut) for ups, [down] in experts]

    def _why_whole(self, ups: list[Placed], downs: list[Placed]) -> str:
        """Why ranks have whole experts, each other ones; "" where each has a share of every expert."""
        schemes = [self.scheme_at(place) for place in (*ups, *downs)]
        if any(scheme.weight.lattice is not None for scheme in schemes):
            return "a share of each would be gathered expert by expert"
        size = downs[0].part.shape[1]
        for down in (self.scheme_at(place) for place in downs):
            asked = down.activation
            if asked is not None and asked.mode == "dynamic" and asked.depends_on_batch:
                return "a share of each would ask the other ranks expert by expert"
            if column_borders(down, size, self.parallel.size) is not None:
                return "codebooks of columns"
            if down.reordered and not all(self.scheme_at(up).rows_move for up in ups):
                return "rows that cannot follow act-order"
            if cut_evenly(self.parallel, size, column_unit(down, size)) is None:
                return "fewer groups of columns than ranks"
        return ""

    def _cut_expert(self, ups: list[Placed], down: Placed, cut: Cut) -> tuple[list[Placed], list[Placed]]:
        cut, inner = self._following(cut, ups, down), down.part.shape[1]
        offsets = (0, inner) if len(ups) == 1 else (0,)
        rows = tuple((offset, cut) for offset in offsets)
        return [replace(up, rows=rows) for up in ups], [replace(down, columns=cut)]

    def inner_cut(self, name: str, into: list[Part], out_of: Part) -> Cut | None:
        """Where blocks of the second's columns end, and of the first's rows if that leaves enough for all."""
        if self.parallel.size == 1:
            return None
        ups, [down] = self.names.place(name, into), self.names.place(out_of.name, [out_of])
        if all(self._product_of(place) for place in (*ups, down)):
            return None  # what is gathered before is all that comes after
        cut = self._inner_ranges(ups, [down])
        if not all(self.scheme_at(up).rows_move for up in ups):
            return cut  # with act-order the second's inputs are gathered
        return self._following(cut, ups, down)

    def _inner_ranges(self, ups: list[Placed], downs: list[Placed]) -> Cut:
        size = downs[0].part.shape[1]
        own, schemes = self._own_columns(downs[0]), [self.scheme_at(up) for up in ups]
        if own is not None and (
            not self.scheme_at(downs[0]).reordered or all(scheme.rows_move for scheme in schemes)
        ):
            together = math.lcm(*map(row_unit, schemes))
            if all(start % together == 0 for start, _ in own.ranges):
                return own
        unit = math.lcm(*(self._column_unit(down) for down in downs))
        low = math.lcm(unit, *map(row_unit, schemes))
        for handy in (64, 32, 16):  # rows and columns of which kernels make tiles
            step = math.lcm(low, handy)
            units = -(-size // step)
            even = units % self.parallel.size == 0 or units >= _MANY * self.parallel.size
            if even and (cut := cut_evenly(self.parallel, size, step)) is not None:
                return cut
        cut = cut_evenly(self.parallel, size, low) or cut_evenly(self.parallel, size, unit)
        if cut is None:
            raise self._too_few(downs[0], unit)
        return cut

    def _own_columns(self, place: Placed) -> Cut | None:
        """Which columns ranks have of a module whose columns have codebooks of their own."""
        borders = column_borders(self.scheme_at(place), place.part.shape[1], self.parallel.size)
        return None if borders is None else Cut(self.parallel.rank, tuple(pairwise(borders)))

    def _column_unit(self, place: Placed) -> int:
        """So many inputs of a module stay together; 1 where they are gathered, whatever they are."""
        if self._product_of(place) is not None or self._own_columns(place) is not None:
            return 1
        return column_unit(self.scheme_at(place), place.part.shape[1])

    def _product_of(self, place: Placed) -> Cut | None:
        """Which rows of a lattice's codes a rank multiplies; None of others, and in one process."""
        scheme = self.scheme_at(place)
        if self.parallel.size == 1 or scheme.weight.lattice is None:
            return None
        return cut_evenly(self.parallel, place.part.shape[0], TILE_ROWS)

    def _following(self, cut: Cut, ups: list[Placed], down: Placed) -> Cut:
        """With act-order a rank has columns as they are stored, and what comes before gives them in that
        order: vectors of several rows are decoded for it."""
        if not self.scheme_at(down).reordered:
            return cut
        schemes = [(up, self.scheme_at(up)) for up in ups]
        fixed = next((up for up, one in schemes if not one.rows_move and not one.weight.is_tall), None)
        if fixed is not None:
            raise self._cannot(
                f"{down.part.name} has act-order and the rows of {fixed.part.name} ({self.scheme_at(fixed)}) "
                "cannot follow it; use --tp-size 1"
            )
        return replace(cut, order=self.column_order(down)[cut.slice])

    def column_order(self, place: Placed) -> Tensor:
        """int64: the order the columns of a module with act-order are stored in; only a loader reads it."""
        return torch.arange(place.part.shape[1])

    def scheme_at(self, place: Placed) -> Scheme:
        """The scheme a module will have, with what is done to its input."""
        decision = self.decide(place)
        return self.with_inputs(place, self.stored_scheme(place) if decision is None else decision.scheme)

    def stored_scheme(self, place: Placed) -> Scheme:
        """What a module's reader gives; decoded where ranks cut what nothing can."""
        scheme, (rows, columns) = self.form.scheme_of(place.module), place.part.shape
        if self.parallel.size == 1:
            return scheme
        stuck, vectors = False, scheme.weight.vectors
        if scheme.weight.lattice is not None:
            stuck = rows < TILE_ROWS * self.parallel.size or not self._runs_coded(scheme.weight_alone)
        elif scheme.weight.trellis is not None:
            stuck = columns <= BLOCK * (self.parallel.size - 1)
        elif isinstance(vectors, RowVectorLayout) and vectors.width:
            stuck = column_borders(scheme, columns, self.parallel.size) is None
        return self.as_run(scheme.decoded) if stuck else scheme

    def _cut(self, places: list[Placed], parts: list[Part]) -> list[Placed]:
        """What is here of the parts."""
        if self.parallel.size == 1:
            return places
        if len(places) < len(parts):
            firsts = accumulate((part.shape[0] for part in parts), initial=0)
            rows = [run for first, part in zip(firsts, parts, strict=False) for run in _runs(part, first)]
            cut = [replace(places[0], rows=tuple(rows))]
        else:
            cut = [replace(place, rows=_runs(part)) for place, part in zip(places, parts, strict=True)]
            cut = [
                self._cut_columns(place, part.columns) if part.columns else place
                for place, part in zip(cut, parts, strict=True)
            ]
        cut = [replace(place, product=self._product_of(place)) for place in cut]
        for place in cut:
            if place.columns is not None and self.scheme_at(place).output is not None:
                raise self._cannot(
                    f"the outputs of {place.part.name} are rounded, of which each rank would have a part of "
                    "the sum; use --tp-size 1"
                )
            if place.rows and (rotation := self.scheme_at(place).output_rotation) is not None:
                inside = [start for run in place.runs for start in run if start % rotation.size]
                if inside or place.picked_rows is not None:
                    raise self._cannot(
                        f"the outputs of {place.part.name} are rotated in blocks of {rotation.size}, which "
                        "its ranks' rows would cut; use --tp-size 1"
                    )
        return cut

    def _cut_columns(self, place: Placed, inputs: Cut) -> Placed:
        """The columns of the rank's own inputs, or where these end inside a block the next best."""
        scheme, columns = self.scheme_at(place), place.part.shape[1]
        if inputs.order is not None:
            return replace(place, columns=inputs)
        if self._product_of(place) is not None:
            return replace(place, inputs=inputs)
        if (parted := self._own_columns(place)) is not None:
            same = not scheme.reordered and parted.ranges == inputs.ranges
            return replace(place, columns=parted, inputs=None if same else inputs)
        unit = column_unit(scheme, columns)
        inside = [start for start, _ in inputs.ranges if start % unit]
        if not scheme.reordered and not inside:
            return replace(place, columns=inputs)
        own = cut_evenly(self.parallel, columns, unit)
        if own is None:
            raise self._too_few(place, unit)
        return replace(place, columns=own, inputs=inputs)

    def _too_few(self, place: Placed, unit: int) -> LowbitError:
        columns = place.part.shape[1]
        most = -(-columns // unit)
        return self._cannot(
            f"the {columns} columns of {place.part.name} ({self.scheme_at(place)}) are {most} "
            f"group{'s' * (most > 1)} of {unit}, which stay whole; use --tp-size {most}"
            + " or less"
            * (most > 1)
        )

    def _cannot(self, why: str) -> LowbitError:
        return LowbitError("E0431", f"{self.header.root.name}: --tp-size {self.parallel.size}: {why}")

    def cut_of(self, place: Placed) -> str:
        """In words how the ranks share a module; "" where each has all of it."""
        if place.whole:
            return place.whole
        if place.product is not None:
            gathered = "products" if place.inputs is None else "inputs and products"
            return f"codes of rows {place.product}, {gathered} gathered"
        if place.rows:
            order = "" if place.picked_rows is None else ", in the order of the next layer's columns"
            if self._stays_in_order(place):
                order = ", as stored, results put in order"
            return f"rows {' + '.join(dict.fromkeys(str(cut) for _, cut in place.rows))}{order}"
        if place.columns is None:
            return "" if self.parallel.size == 1 else "whole on every rank"
        scheme = self.scheme_at(place)
        parted = self._own_columns(place) is not None
        unit = self._column_unit(place)
        said = f"columns {place.columns}" + (f" in groups of {unit}" if unit > 1 else "")
        said += " with their codebooks" * parted
        if place.inputs is None:
            return said + (", in stored order (act-order)" if scheme.reordered else "")
        why = "codebooks end elsewhere" if parted else "heads end inside groups"
        why = "act-order" if scheme.reordered else why
        return f"{said}, inputs gathered ({why})"

    def _stays_in_order(self, place: Placed) -> bool:
        """Rows that would move and share scales, or more: outputs are put in order instead (``Linear``)."""
        if place.product is not None:
            return False  # what is gathered is
        return (place.groups > 0 or place.swapped) and not self.stored_scheme(place).rows_move

    def placed_stack(self, part: Part, stacked: int) -> list[Placed]:
        """The one module, or each of those stacked under one name."""
        [place] = self.names.place(part.name, [part])
        if not stacked:
            return [self._taken(place)]
        dotted = not self.names.in_gguf and place.module.tensor("weight") in self.header.tensors
        modules = [replace(place.module, expert=n, experts=stacked, dotted=dotted) for n in range(stacked)]
        return [self._taken(replace(place, module=module)) for module in modules]

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores a module of this canonical name."""
        return self.names.has(name)

    def row_norms(self, part: Part) -> Tensor:
        """Ones: only a loader has values."""
        return torch.ones(part.shape[0])

    def _taken(self, place: Placed) -> Placed:
        tensors = self.form.tensors_of(place.module)
        self.names.take(tensors)
        self.transforms.meet(place.module)
        if place.part.bias:
            gguf = self.header.container == "gguf"
            bias = f"{place.module.stored}.bias" if gguf else place.module.tensor("bias")
            if bias not in tensors:
                self.names.take([bias])
        return place

    def head_rotations(self, attention: str, head_dim: int) -> tuple[Rotator | None, Rotator | None]:
        """Their tensors are taken; only a loader has values."""
        self.names.take(self.transforms.tensors_of_heads(attention, self.attention_at(attention), head_dim))
        return None, None

    def attention_at(self, attention: str) -> str:
        """The stored name of an attention, by its query projection."""
        stored = self.names.tensor(f"{attention}.q_proj.weight")
        return stored.removesuffix(".q_proj.weight") if stored.endswith(".q_proj.weight") else attention

    def refuse_leftovers(self) -> None:
        """E0218 where a rotation met no layer, E0217 where a stored tensor was not asked for."""
        self.transforms.refuse_unmet()
        self.names.refuse_leftovers()

    def stored_nbytes(self, place: Placed) -> int:
        """Bytes of the module in the files; its share of a stack of experts."""
        tensors = self.form.tensors_of(place.module)
        return sum(self.header.tensors[name].nbytes for name in tensors) // (place.module.experts or 1)

    def decide(self, place: Placed) -> Decision | None:
        """What quantizing at load makes of a module; None: nothing is quantized."""
        return None if self.online is None else self.online.decide(place, self.form.scheme_of(place.module))

    def check_vector(self, name: str, *shape: int) -> str:
        """The stored name of a float tensor of that shape."""
        stored = self.names.tensor(name)
        self.names.take([stored])
        entry = self.header.tensors[stored]
        in_gguf = self.header.container == "gguf"
        fits = entry.is_matrix_of(shape) if in_gguf else entry.shape == shape
        if not fits or entry.dtype not in VECTOR_DTYPES:
            wanted = " x ".join(map(str, shape))
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {stored!r} is {entry.dtype} {list(entry.shape)} but the config "
                f"asks for {wanted} floats; config and weights are from different models",
            )
        return stored

    def wanted_kernel(self, place: Placed) -> Wanted:
        """What ``--linear-kernel`` says of a module."""
        return self.target.kernels.wanted(place.part.name, role_of(place))

    def with_inputs(self, place: Placed, scheme: Scheme) -> Scheme:
        """The scheme with int8 inputs, where they were asked for and its kernel can multiply them."""
        if not self.target.int8_inputs or scheme.is_dense or scheme.activation is not None:
            return scheme
        part = place.part
        # The last layer's rounding goes straight into logits: a quarter of the embedded model's divergence.
        last = self._last_of_many is not None and part.name.startswith(self._last_of_many)
        if part.router or last:
            return scheme
        if part.name == "model.embed_tokens" and not self.tied_head:
            return scheme
        run, asked = self.as_run(scheme), replace(scheme, activation=INT8_GROUPS)
        choice = self.target.kernels.of(self.wanted_kernel(place), asked, part.shape, self.device)
        return asked if choice.kernel.takes_int8(run, part.shape) else scheme

    def as_run(self, scheme: Scheme) -> Scheme:
        """Dense weights follow ``--dtype``; quantized ones are what they are. Inputs are the layer's.

        Codebooks, trellises, lattices and outliers for which there is no kernel here are decoded when they
        are loaded (``Scheme.decoded``).
        """
        scheme = scheme.weight_alone
        if not self._runs_coded(scheme):
            scheme = scheme.decoded
        if not scheme.is_dense or self.target.dense_dtype is None:
            return scheme
        return replace(scheme, weight=number_format(_DTYPES[str(self.target.dense_dtype)[6:]]))

    def _runs_coded(self, scheme: Scheme) -> bool:
        """Whether codebooks, a trellis, a lattice or outliers, if that is what it has, can stay."""
        coded, vectors = scheme.weight, scheme.weight.vectors
        if all(part is None for part in (vectors, coded.trellis, coded.lattice, scheme.outliers)):
            return True
        shape = (16, BLOCK)
        if isinstance(vectors, RowVectorLayout):
            shape = (16, vectors.columns or 32 * vectors.length)
        elif vectors is not None:
            groups = (width or 1 for _, width in scheme.blocks)
            shape = (16 * vectors.height, math.lcm(32 * vectors.length, *groups))
        elif coded.trellis is not None:
            shape = (scheme.rows_together, BLOCK)
        return choose(scheme, shape, self.device).kernel.name != "reference"


def _runs(part: Part, first: int = 0) -> tuple[tuple[int, Cut], ...]:
    """(first row, cut) of each run of a part's rows that ranks share, in rows from ``first`` on."""
    cuts = () if part.rows is None else part.rows if isinstance(part.rows, tuple) else (part.rows,)
    firsts = accumulate((cut.whole for cut in cuts), initial=first)
    return tuple(zip(firsts, cuts, strict=False))
