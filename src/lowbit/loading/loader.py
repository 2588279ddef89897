"""Loader: the ``WeightLoader`` that reads, quantizes where that is asked for, fuses and packs.

A module is read in canonical form, equal parts are fused and packed for the chosen kernel, and the canonical
form is dropped before the next module is read: peak memory is the packed model plus one module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear
from lowbit.formats.kv_scales import KvScales
from lowbit.kernels import PackedWeight
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.host_memory import WeightRoom
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.rounded_output import OutputTransform, RoundedOutput, same_output
from lowbit.kernels.settled import settled
from lowbit.kernels.timing import COPY
from lowbit.layers.cuts import Cut
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Columns, Embedding, Gathered, Linear, Part
from lowbit.loading import head_screen
from lowbit.loading.asker import Asker
from lowbit.loading.kernel_choice import Wanted
from lowbit.loading.names import Placed, StoredRows, row_order
from lowbit.loading.opened import Opened, Target
from lowbit.loading.packed_cache import Kept
from lowbit.loading.samples import Samples, sample_of, with_inputs
from lowbit.loading.self_check import check_packed
from lowbit.models.language_model import LanguageModel
from lowbit.models.model import Model
from lowbit.numerics import lattice
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.cutting import cut_columns, cut_rows, pick_rows
from lowbit.numerics.int8_inputs import INT8_GROUPS
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.method import largest_weight

_log = logging.getLogger("lowbit")
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what


@dataclass
class ReadPart:
    """One stored module read: its weight, bias, what it wants of its input and the kernel it is to have."""

    weight: QuantizedTensor
    bias: Tensor | None
    transform: InputTransform | None
    wanted: Wanted
    picked: Tensor | None = None  # of a layer cut in columns: which of all ranks' inputs they multiply
    output: OutputTransform | None = None  # of its results
    gathered: Gathered | None = None
    rows: int = field(init=False)  # of its results

    def __post_init__(self) -> None:
        self.rows = self.weight.shape[-2] if self.gathered is None else self.gathered.size


class Loader(Asker):
    """``WeightLoader`` that reads and packs."""

    def __init__(
        self,
        opened: Opened,
        target: Target,
        data: TensorData,
        kv_scales: KvScales,
        on_progress: Progress | None = None,
        samples: Samples | None = None,
        kept: Mapping[str, Kept] | None = None,
    ) -> None:
        """``kept``: modules that were packed before; None: nor is remembered what is packed now."""
        super().__init__(opened, target)
        self.data = data
        self.samples = samples
        self.on_progress = on_progress
        self.done = 0
        self.kernels: set[str] = set()
        self.packed_bytes = 0
        self.room = WeightRoom()
        self.spans_tokens = False
        self.int8_layers = 0  # whose inputs --activation-quantization rounds
        self.states = ActivationStates()
        self._said_unused = False
        self._kv_scales = kv_scales
        self._kept = kept
        self.mapped_bytes = 0  # of the packed ones, those that came so
        self.made: dict[str, Kept] = {}  # every module, as it could be kept
        self._rotators: dict[int, tuple[Rotation, Rotator]] = {}  # by the id of the reader's, which is kept
        self._expert_bytes = 0
        self.outdated = False  # whether kept modules had to be packed for another kernel

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """Read the parts, fuse neighbours that allow it, pack."""
        return self._linear(name, self.placed(name, parts))

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Read and pack one expert after another."""
        gate_up, down, before = [], [], self.packed_bytes
        experts, here = self.placed_experts(name, spec), []
        for number, (first, last) in enumerate(experts):
            if last[0].elsewhere:
                for place in (*first, *last):
                    if self.online is not None and (decision := self.decide(place)) is not None:
                        self.online.note(decision)
                    self._report(place, "loading")
                continue
            here.append(number)
            gate_up.append(self._linear(f"{name}.{number}.gate_up_proj", first))
            down.append(self._linear(f"{name}.{number}.down_proj", last, summed=False))
        self._expert_bytes += self.packed_bytes - before
        whole = None if len(here) == len(experts) else range(here[0], here[-1] + 1)
        return Experts(name, gate_up, down, self.parallel, whole)

    def embedding(self, part: Part) -> Embedding:
        """Read and pack the embedding matrix; a tied head's inputs are the head's."""
        places = self.placed(part.name, [part])
        kept = self._taken_from_cache(part.name, places)
        weight = None
        if kept is None:
            read = self._read(places[0])
            weight = read.weight
            transform = read.transform if _rounds_in_groups(read.transform) else None  # rows are as they are
            kept = Kept([self._pack(weight, transform, read.wanted)], [transform])
        self._remember(part.name, kept)
        assert not isinstance(part.rows, tuple), "a vocabulary is one run"
        [packed], [transform] = kept.weights, kept.inputs
        if not self.tied_head:
            return Embedding(packed, self.parallel, part.rows)
        self._note(weight, packed, transform, self.wanted_kernel(places[0]))
        self.int8_layers += _rounds_in_groups(transform)
        return Embedding(packed, self.parallel, part.rows, settled(packed, transform))

    def screen(self, model: Model, wanted: str) -> None:
        """Give the model's output head a screen where ``--lm-head-screen`` says so; after all else."""
        assert isinstance(model, LanguageModel), "all families are"
        head, config = model.head.weights[0], model.config
        lookup = 0 if config.tied_head else model.embedding.weight.nbytes
        weights = head_screen.Weights(head.nbytes, lookup, self._expert_bytes, self.packed_bytes)
        options = (config, head.scheme, head.kernel.name, weights, self.device, self.parallel.size)
        if head_screen.refuses(wanted, *options) is None:
            model.screened = head_screen.screened(model.head, config, self._screen, wanted)

    def _screen(self, name: str, make: Callable[[], PackedWeight | None]) -> PackedWeight | None:
        """As it was made before, or now."""
        kept = None if self._kept is None else self._kept.get(name)
        if kept is None:
            made = make()
            if made is None:
                return None
            kept = Kept([made], [None])
        else:
            self.mapped_bytes += kept.weights[0].nbytes
        self._remember(name, kept)
        self.packed_bytes += kept.weights[0].nbytes
        return kept.weights[0]

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """The dequantized matrix itself, or (stacked, out, in) of them."""
        found = []
        for place in self.placed_stack(part, stacked):
            read = self._read(place, as_stored=True)
            matrix = read.weight.dequantize().to(self.device)
            if read.transform is not None and read.transform.multiplier is not None:
                matrix = matrix * read.transform.multiplier  # what x would have been multiplied by
            if read.transform is not None and read.transform.rotation is not None:
                matrix = read.transform.rotation.rotation.transposed(matrix)  # (x R) W^T is x (W R^T)^T
            if isinstance(read.output, RoundedOutput):
                raise LowbitError(
                    "E0218",
                    f"{read.weight.origin}: its outputs are rounded, and attention here multiplies with the "
                    "matrix itself; use a version whose activations are not quantized",
                )
            if read.output is not None:
                matrix = read.output.rotation(matrix.T).T.contiguous()
            found.append(matrix)
        return torch.stack(found) if stacked else found[0]

    def vector(self, name: str, *shape: int) -> Tensor:
        """A float32 copy of a small tensor."""
        stored = self.check_vector(name, *shape)
        tensor = self.data.tensor(stored).view(shape)
        return tensor.to(device=self.device, dtype=torch.float32, copy=True)

    def row_norms(self, part: Part) -> Tensor:
        """Of the matrix as stored, some rows at a time."""
        [place] = self.names.place(part.name, [part])
        weight = self.form.read(place.module, self.data).weight
        height = max(weight.scheme.heights)
        step = -(-4096 // height) * height
        starts = range(0, part.shape[0], step)
        slices = (weight.rows(at, min(at + step, part.shape[0])).dequantize() for at in starts)
        return torch.cat([rows.norm(dim=1) for rows in slices]).to(self.device)

    def column_order(self, place: Placed) -> Tensor:
        """As the file has it."""
        order = self.form.read(place.module, self.data).weight.column_order
        return super().column_order(place) if order is None else order

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """What the checkpoint (or the file that was passed) says K and V are divided by in the cache."""
        found = self._kv_scales.of_layer(self.names, attention, layer, self.data)
        if found is None:
            return 1.0, 1.0
        if not self.cache_dtype.takes_scales and found != (1.0, 1.0) and not self._said_unused:
            self._said_unused = True
            _log.warning("lowbit: KV scales are only used with --kv-cache-dtype fp8_e4m3")
        k, v = (stored.name == "fp8_e4m3" for stored in (self.cache_dtype.k, self.cache_dtype.v))
        return found[0] if k else 1.0, found[1] if v else 1.0

    def head_rotations(self, attention: str, head_dim: int) -> tuple[Rotator | None, Rotator | None]:
        """As the checkpoint has them."""
        super().head_rotations(attention, head_dim)
        q, k = self.transforms.read_heads(attention, self.attention_at(attention), head_dim, self.data)
        return self._rotator(q), self._rotator(k)

    def _rotator(self, rotation: Rotation | None) -> Rotator | None:
        """On the device, one object for all layers that share it."""
        if rotation is None:
            return None
        if id(rotation) not in self._rotators:
            self._rotators[id(rotation)] = rotation, Rotator(rotation.to(self.device))
        return self._rotators[id(rotation)][1]

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """e4m3 with the layer's scales where they are known; each token's own otherwise."""
        known = self._kv_scales.of_layer(self.names, attention, layer, self.data) is not None
        return self.cache_dtype.with_static_scales() if known else self.cache_dtype

    def _linear(self, name: str, places: list[Placed], summed: bool = True) -> Linear:
        """``summed``: over the ranks, where the layer is cut in columns."""
        kept = self._taken_from_cache(name, places)
        picked: Tensor | None = None
        gathered: list[Gathered | None] = []
        if kept is None:
            kept, picked, gathered = self._packed(places)
        else:
            for weight, transform, wanted in self._whose(kept, places):
                self._note(None, weight, transform, wanted)
        self._remember(name, kept)
        with_state: dict[int, InputTransform] = {}
        inputs: list[InputTransform | None] = []
        for packed, transform in zip(kept.weights, kept.inputs, strict=True):
            self.int8_layers += _rounds_in_groups(transform)
            if transform is not None and transform.scheme is not None and transform.scheme.depends_on_batch:
                self.spans_tokens = True
            if transform is not None and transform.scheme is not None and transform.scheme.delay is not None:
                if id(transform) not in with_state:
                    state = self.states.add(name, transform.scheme, self.device, transform.across)
                    with_state[id(transform)] = replace(transform, state=state)
                transform = with_state[id(transform)]
            inputs.append(settled(packed, transform))
        order = self._order_of_outputs(places)
        columns = None
        if places[0].columns is not None and summed:
            widths = () if places[0].inputs is None else places[0].inputs.widths
            columns = Columns(self.parallel, widths, None if picked is None else picked.to(self.device))
        elif places[0].product is not None:
            widths = () if places[0].inputs is None else places[0].inputs.widths
            columns = Columns(self.parallel, widths, sums=False)
        order = None if order is None else order.to(self.device)
        return Linear(name, kept.weights, kept.bias, inputs, order, columns, kept.outputs, gathered)

    def _order_of_outputs(self, places: list[Placed]) -> Tensor | None:
        """int64 (out,): where each output lies, where rows could not be moved."""
        if not any(self._stays_in_order(place) for place in places):
            return None
        orders, start = [], 0
        for place in places:
            stays = self._stays_in_order(place)
            order = StoredRows.of(place, self.header).places if stays else torch.arange(place.outputs)
            orders.append(start + order)
            start += place.outputs
        return torch.cat(orders)

    def _packed(self, places: list[Placed]) -> tuple[Kept, Tensor | None, list[Gathered | None]]:
        """The parts read, neighbours fused where they allow it, and packed; the inputs that are picked, and
        whose products are gathered."""
        largest = self._largest(places)
        read = [self._read(place, largest=largest) for place in places]
        picked = read[0].picked
        bias = self._bias(read)
        weights: list[PackedWeight] = []
        inputs: list[InputTransform | None] = []
        outputs: list[OutputTransform | None] = []
        gathered = [part.gathered for part in read]  # none of these is fused
        for weight, transform, wanted, output in _fused(read):
            weights.append(self._pack(weight, transform, wanted))
            inputs.append(transform)
            outputs.append(output)
            self._note(weight, weights[-1], transform, wanted)
        assert not any(gathered) or len(gathered) == len(weights), "the others' codes are their own, too"
        return Kept(weights, inputs, bias, outputs), picked, gathered if any(gathered) else []

    def _note(
        self,
        weight: QuantizedTensor | None,
        packed: PackedWeight,
        transform: InputTransform | None,
        wanted: Wanted,
    ) -> None:
        """For the log and for timing: a weight that is multiplied with."""
        kernels, scheme = self.target.kernels, with_inputs(packed.scheme, transform)
        choice = kernels.of(wanted, scheme, packed.shape, self.device)
        kernels.note(choice, scheme, packed.shape)
        if self.samples is not None:
            copies = any(loser.kernel == COPY for loser in choice.losers)
            self.samples.note(weight, packed, transform, copies)

    def _taken_from_cache(self, name: str, places: list[Placed]) -> Kept | None:
        """The module as it was packed before, and everything else that reading it would have done."""
        kept = None if self._kept is None else self._kept.get(name)
        if kept is None:
            return None
        if not self._as_chosen(kept, places):
            self.outdated = True
            return None
        for place in places:
            if self.online is not None and (decision := self.decide(place)) is not None:
                self.online.note(decision)
            self._report(place, "loading")
        for weight in kept.weights:
            self.kernels.add(weight.kernel.name)
            self.packed_bytes += weight.nbytes
            self.mapped_bytes += weight.nbytes
        return kept

    def _as_chosen(self, kept: Kept, places: list[Placed]) -> bool:
        """Whether the module would be packed for the same kernels today: timings may have come or changed."""
        return all(
            self.target.kernels.of(
                wanted, with_inputs(weight.scheme, transform), weight.shape, self.device
            ).kernel.name
            == weight.kernel.name
            for weight, transform, wanted in self._whose(kept, places)
        )

    def _whose(
        self, kept: Kept, places: list[Placed]
    ) -> Iterator[tuple[PackedWeight, InputTransform | None, Wanted]]:
        """Each weight with its input and what is wanted for the first of the modules in it."""
        first_rows = accumulate((place.shape[0] for place in places), initial=0)
        place_at = dict(zip(first_rows, places, strict=False))
        row = 0
        for weight, transform in zip(kept.weights, kept.inputs, strict=True):
            yield weight, transform, self.wanted_kernel(place_at[row])
            row += weight.shape[0]

    def _remember(self, name: str, kept: Kept) -> None:
        if self._kept is not None:
            assert name not in self.made, f"two modules are called {name}"
            self.made[name] = kept

    def _report(self, place: Placed, what: str) -> None:
        if self.on_progress is not None:
            self.done += self.stored_nbytes(place)
            self.on_progress(self.done, self.header.nbytes, what)

    def _largest(self, places: list[Placed]) -> float:
        """The largest |w| of the parts that share an outer scale; 0 where not several do."""
        decided = [(place, self.decide(place)) for place in places]
        shared = [place for place, decision in decided if decision is not None and decision.shares_scale]
        if len(shared) < 2:
            return 0.0
        return max(largest_weight(self.form.read(place.module, self.data).weight.codes) for place in shared)

    def _read(self, place: Placed, as_stored: bool = False, largest: float = 0.0) -> ReadPart:
        stored = self.form.read(place.module, self.data)
        weight, bias, rule = stored.weight, stored.bias, stored.input
        if (known := self.stored_scheme(place)).is_dense and weight.scheme.weight.in_bytes:
            weight = weight.decoded(known)  # ranks cut what nothing can
        if stored.output is not None and row_order(place, self.header) is not None:
            raise LowbitError(
                "E0218",
                f"{weight.origin}: its outputs are rotated and stored in another order than the model's, "
                "which lowbit does not do. Use a quantization of the same model without transforms",
            )
        moves = place.product is None and not self._stays_in_order(place)
        order = row_order(place, self.header) if moves else None
        decision = None if self.online is None or as_stored else self.decide(place)
        if order is not None and (decision is not None or not place.rows):
            weight, bias, order = weight.permute_rows(order), None if bias is None else bias[order], None
        if decision is not None:
            assert self.online is not None, "it decided"
            decision = decision.with_largest(largest)
            made = self.online.quantize(decision, weight)  # the whole module, as in one process
            weight = made.weight
            rule = None if made.static_scale is None else InputRule(static_scale=made.static_scale)
        if (rule is None or rule.only_rotates) and not as_stored:
            weight = replace(weight, scheme=self.with_inputs(place, weight.scheme))
        picked = gathered = None
        if place.product is not None:
            weight, bias, gathered = self._shared_product(place, weight, bias)
        elif place.rows:
            runs = StoredRows.of(place, self.header).runs if self._stays_in_order(place) else place.runs
            weight, bias = _rows_here(place, weight, bias, order, runs)
        if place.columns is not None:
            weight, columns = _columns_here(place.columns, weight)
            picked = None if place.inputs is None else columns
            bias = bias if self.parallel.rank == 0 else None  # it is summed
            if rule is not None and rule.multiplier is not None:
                rule = replace(rule, multiplier=rule.multiplier[columns])
            if rule is not None and rule.rotation is not None:
                rule = replace(rule, rotation=rule.rotation.columns(place.columns.start, place.columns.stop))
        transform, output = self._transform(weight.scheme, rule), self._output(weight.scheme, stored)
        if transform is not None and place.columns is not None and transform.sees_whole_rows:
            transform = replace(transform, across=self.parallel)
        weight = self._cast(weight)
        self._report(place, "loading" if self.online is None else "quantizing")
        return ReadPart(weight, bias, transform, self.wanted_kernel(place), picked, output, gathered)

    def _shared_product(
        self, place: Placed, weight: QuantizedTensor, bias: Tensor | None
    ) -> tuple[QuantizedTensor, Tensor | None, Gathered]:
        """Of a lattice some rows of its codes, and what becomes of their products."""
        assert place.product is not None, "callers look first"
        cut, (outputs, inputs) = place.product, weight.scales
        half = replace(weight.scheme, blocks=weight.scheme.blocks[1:], scales=weight.scheme.scales[1:])
        part = replace(weight, scheme=half, scales=(inputs,)).rows(cut.start, cut.stop)
        order, wanted = row_order(place, self.header), None
        if place.rows or order is not None:
            wanted = place.wanted_rows if order is None else order[place.wanted_rows]
            bias = None if bias is None else bias[wanted]
            wanted = wanted.to(self.device)
        after = Rotator(lattice.transform(len(outputs), after=outputs.flatten()).to(self.device))
        return part, bias, Gathered(self.parallel, cut.widths, after, wanted)

    def _transform(self, scheme: Scheme, rule: InputRule | None) -> InputTransform | None:
        if scheme.activation is None and rule is None:
            return None
        rule = rule or InputRule()

        def owned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32, copy=True)

        return InputTransform(
            scheme.activation,
            owned(rule.multiplier),
            owned(rule.static_scale),
            owned(rule.static_zero),
            rotation=self._rotator(rule.rotation),
        )

    def _output(self, scheme: Scheme, stored: StoredLinear) -> OutputTransform | None:
        if scheme.output is None:
            return self._rotator(stored.output)
        assert stored.output is None and stored.output_scale is not None, "outputs have their scale"
        scale = stored.output_scale.to(self.device, torch.float32, copy=True)
        return RoundedOutput(InputTransform(scheme.output, static_scale=scale))

    def _cast(self, weight: QuantizedTensor) -> QuantizedTensor:
        scheme = self.as_run(weight.scheme)
        if scheme is weight.scheme:
            return weight
        if scheme.is_dense and not weight.scheme.is_dense:
            return weight.decoded(scheme)
        if scheme.is_dense:
            return replace(weight, scheme=scheme, codes=weight.codes.to(scheme.weight.dtype))
        return replace(weight, scheme=scheme)

    def _pack(
        self, weight: QuantizedTensor, transform: InputTransform | None, wanted: Wanted
    ) -> PackedWeight:
        kernels, scheme = self.target.kernels, with_inputs(weight.scheme, transform)
        if (untimed := kernels.untimed(wanted, scheme, weight.shape, self.device)) is not None:
            kernels.measure(sample_of(weight, untimed, transform, self.device), self.device)
        kernel = kernels.of(wanted, scheme, weight.shape, self.device).kernel
        self.kernels.add(kernel.name)
        with self.room.used():
            packed = kernel.pack(weight, self.device)
        check_packed(weight, packed)
        self.packed_bytes += packed.nbytes
        return packed

    def _bias(self, read: list[ReadPart]) -> Tensor | None:
        """The parts' biases below each other, zeros where a part has none."""
        if all(part.bias is None for part in read):
            return None
        rows = [torch.zeros(part.rows) if part.bias is None else part.bias.float() for part in read]
        return torch.cat(rows).to(device=self.device, dtype=self.activation_dtype)


def _rows_here(
    place: Placed,
    weight: QuantizedTensor,
    bias: Tensor | None,
    order: Tensor | None,
    runs: list[tuple[int, int]],
) -> tuple[QuantizedTensor, Tensor | None]:
    """The rows of a rank. ``order``: where each of the model's rows lies, if not just there; ``runs``: where
    they lie if so."""
    if place.picked_rows is None and order is None:
        if bias is not None:
            bias = torch.cat([bias[start:stop] for start, stop in runs])
        return cut_rows(weight, runs), bias
    picked = place.wanted_rows if order is None else order[place.wanted_rows]
    if weight.scheme.weight.is_tall:
        weight = weight.decoded(weight.scheme.decoded)
    return pick_rows(weight, picked), None if bias is None else bias[picked]


def _columns_here(cut: Cut, weight: QuantizedTensor) -> tuple[QuantizedTensor, Tensor]:
    """The columns of a rank, and which inputs of the whole layer they multiply; they need no other order
    then."""
    here = cut_columns(weight, cut.start, cut.stop)
    columns = torch.arange(cut.start, cut.stop) if here.column_order is None else here.column_order
    return replace(here, column_order=None, scheme=replace(here.scheme, reordered=False)), columns


def _rounds_in_groups(transform: InputTransform | None) -> bool:
    """Whether it is what ``--activation-quantization`` asks for."""
    return transform is not None and transform.scheme == INT8_GROUPS


def _fused(
    read: list[ReadPart],
) -> Iterator[tuple[QuantizedTensor, InputTransform | None, Wanted, OutputTransform | None]]:
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
        while (
            read
            and _alike(transform, read[0].transform)
            and first.wanted.same_as(read[0].wanted)
            and same_output(first.output, read[0].output)
        ):
            joined = concatenate([*run, read[0].weight])
            if joined is None:
                break
            run = [joined]
            read.pop(0)
        yield run[0], transform, first.wanted, first.output


def _alike(a: InputTransform | None, b: InputTransform | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.same_as(b)
