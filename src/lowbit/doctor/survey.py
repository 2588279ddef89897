"""A survey of the model: builds its architecture and notes everything that does not fit, from headers alone.

``Surveyor`` answers a model family's questions as loading does, but where loading stops at the first tensor
that is missing or of a wrong shape, it writes that down and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.config_rules import check_head
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import Report
from lowbit.errors import LowbitError
from lowbit.formats import CheckpointFormat, Notes, StoredModule, detect
from lowbit.formats.compressed_tensors_transforms import Transforms
from lowbit.formats.dense import VECTOR_DTYPES, Dense
from lowbit.formats.kv_scales import KvScales
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.layers.weight_loader import NOT_SHARED
from lowbit.loading.names import Names, Placed
from lowbit.models.config import ModelConfig
from lowbit.models.registry import Family, family_of, has_plain_head
from lowbit.numerics.cache_format import KvDtype


class DoctorNotes(Notes):
    """Contradictions become findings instead of log lines."""

    def __init__(self, report: Report) -> None:
        super().__init__(False)
        self.report = report

    def contradiction(self, code: str, message: str) -> None:
        """D109."""
        self.report.add_error(LowbitError(code, message))


@dataclass
class Survey:
    """``limits``: tensor -> (lowest, highest) code it may hold; ``tied``: whether the config says that the
    embedding serves as head, and a plain head is there too. None, or empty: nothing could be told."""

    form: CheckpointFormat | None = None
    config: ModelConfig | None = None
    tied: bool = False
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)


def survey(header: CheckpointHeader, report: Report, correction: Correction) -> Survey:
    """Try the format, the config and every module; what is wrong goes to ``report``."""
    found = Survey()
    try:
        # A removed config may still lie beside config.json in a file of its own.
        notes = DoctorNotes(report)
        kind: type[CheckpointFormat] = Dense if correction.drop_quantization else detect(header)
        form = kind(header, notes)
    except LowbitError as error:
        if not report.has("D111"):
            report.add_error(error)
        return found
    found.form = form
    try:
        family = family_of(header)
        found.config = family.config_of(header)
        found.tied = has_plain_head(header) and family.read_config(header).tied_head
    except LowbitError as error:
        report.add_error(error)
        return found
    if not report.whole:
        return found  # what is missing would be listed twice
    check_head(header, found.config.tied_head, report, correction)
    surveyor = Surveyor(header, family, form, found.config, report)
    try:
        family.build(found.config, surveyor)
    except LowbitError as error:
        report.add_error(error)
        return found
    if found.config.tied_head and header.container != "gguf":
        # A stored copy of the tied head is a rule of its own (D115, D116).
        surveyor.names.used.update(name for name in header.tensors if name.startswith("lm_head."))
    try:
        surveyor.names.refuse_leftovers()
    except LowbitError as error:
        report.add_error(error)
    found.limits = surveyor.limits
    return found


class Surveyor:
    """``WeightLoader`` that only complains."""

    parallel = NOT_SHARED
    device = torch.device("cpu")
    activation_dtype = torch.float32
    cache_dtype = KvDtype.of("f32")

    def __init__(
        self,
        header: CheckpointHeader,
        family: Family,
        form: CheckpointFormat,
        config: ModelConfig,
        report: Report,
    ) -> None:
        self.header = header
        self.form = form
        self.report = report
        self.names = Names(header, family, config.layers, form.unused, config.tied_head)
        self.kv_tensors = KvScales(header)
        self.limits: dict[str, tuple[int, int]] = {}

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        if name != "lm_head" or not self.report.has("D114"):
            self._try_places(name, parts)
        return Linear(name, [], None)

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts without weights."""
        for number in range(spec.count):
            for places in self.names.expert(name, spec, number):
                for place in places:
                    self._see(place)
        return Experts(name, [], [])

    def inner_cut(self, name: str, into: list[Part], out_of: Part) -> None:
        """Nothing is cut."""

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        self._try_places(part.name, [part])
        return _NoEmbedding()

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """The right shape on the meta device."""
        try:
            [place] = self.names.place(part.name, [part])
        except LowbitError as error:
            self.report.add_error(error, tensor=part.name)
        else:
            for number in range(stacked or 1):
                module = replace(place.module, expert=number, experts=stacked) if stacked else place.module
                self._see(replace(place, module=module))
        return torch.empty((stacked, *part.shape) if stacked else part.shape, device="meta")

    def vector(self, name: str, *shape: int) -> Tensor:
        """Ones."""
        stored = self.names.tensor(name)
        self._take(stored)
        entry = self.header.tensors.get(stored)
        if entry is not None and (entry.shape != shape or entry.dtype not in VECTOR_DTYPES):
            wanted = " x ".join(map(str, shape))
            self.report.add(
                "D103",
                f"{entry.file.name}: tensor {stored!r} is {entry.dtype} {list(entry.shape)} but the config "
                f"asks for {wanted} floats; config and weights are from different models",
                file=entry.file.name,
                tensor=stored,
            )
        return torch.ones(shape)

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores a module of this canonical name."""
        return self.names.has(name)

    def row_norms(self, part: Part) -> Tensor:
        """Ones: the head is surveyed as any matrix."""
        return torch.ones(part.shape[0])

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """Marks their tensors as used."""
        try:
            self.kv_tensors.find(self.names, attention)
        except LowbitError as error:
            self.report.add_error(error)
        return 1.0, 1.0

    def head_rotations(self, attention: str, head_dim: int) -> tuple[None, None]:
        """Nothing is rotated; their tensors are used."""
        stored = self.names.tensor(f"{attention}.q_proj.weight").removesuffix(".q_proj.weight")
        self.names.used.update(Transforms.of(self.header).tensors_of_heads(attention, stored, head_dim))
        return None, None

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """Nothing is stored."""
        return self.cache_dtype

    def _try_places(self, name: str, parts: list[Part]) -> None:
        try:
            places = self.names.place(name, parts)
        except LowbitError as error:
            self.report.add_error(error, tensor=name)
            return
        for place in places:
            self._see(place)

    def _see(self, place: Placed) -> None:
        """One module: its tensors, their shapes, its scheme."""
        module = place.module
        try:
            scheme = self.form.scheme_of(module)
            tensors = self.form.tensors_of(module)
        except LowbitError as error:
            vocabulary = module.name in ("model.embed_tokens", "lm_head") and error.code == "E0210"
            file = self.header.file_of(module.tensor("weight"))
            self.report.add_error(error, "D118" if vocabulary else "", file=file, tensor=module.stored)
            self.names.used.update(self._tensors_of(module))
            return
        if place.part.bias:
            gguf = self.header.container == "gguf"
            tensors = [*tensors, f"{module.stored}.bias" if gguf else module.tensor("bias")]
        for name in tensors:
            self._take(name)
        bits = int(scheme.weight.bits)
        if scheme.weight.is_integer and bits < 8:
            self._limit(module, bits)

    def _tensors_of(self, module: StoredModule) -> list[str]:
        """The tensors of a module that something is wrong with: they are not without a place as well."""
        try:
            return self.form.tensors_of(module)
        except LowbitError:
            mine = (f"{module.stored}.", f"{module.stored}_")
            return [name for name in self.header.tensors if name.startswith(mine)]

    def _take(self, name: str) -> None:
        try:
            self.names.take([name])
        except LowbitError as error:
            self.report.add_error(error, tensor=name)

    def _limit(self, module: StoredModule, bits: int) -> None:
        """Codes and zero points that are stored one a byte."""
        for suffix in ("weight", "weight_zero_point"):
            entry = self.header.tensors.get(module.tensor(suffix))
            if suffix == "weight" and entry is not None and entry.shape[-2:] != module.shape:
                continue  # two a byte, as W4AFP8 has them
            if entry is not None and entry.dtype == "I8":
                self.limits[entry.name] = (-(1 << bits - 1), (1 << bits - 1) - 1)


class _NoEmbedding(Embedding):
    """An embedding nobody will look anything up in."""

    def __init__(self) -> None:
        pass

    def as_head(self) -> Linear:
        """A head without weights."""
        return Linear("lm_head", [], None)
