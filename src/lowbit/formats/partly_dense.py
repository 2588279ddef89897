"""PartlyDense: what readers of formats have in common that quantize some modules and leave the others plain.

A format of this base says how it tells a plain module (``sign``, or ``_is_dense``), what belongs to another
one and how its weight is read; plain modules, biases and whose checkpoint it is are answered here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear, StoredModule
from lowbit.formats.dense import bias_tensors, dense_scheme, dense_tensors, read_bias, read_dense
from lowbit.formats.quantization_config import says_method
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


class PartlyDense(ABC):
    """See the module docstring, and ``CheckpointFormat`` for the methods without an underscore."""

    name: ClassVar[str]
    aliases: tuple[str, ...] = ()  # a checkpoint may have fewer
    reference: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    sign: ClassVar[str] = ""  # the tensor that every quantized module has and no plain one
    header: CheckpointHeader

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """The config's quant_method is the format's name."""
        return says_method(header, cls.name)

    def scheme_of(self, module: StoredModule) -> Scheme:
        """Of a plain matrix, or the format's."""
        return dense_scheme(self.header, module) if self._is_dense(module) else self._scheme(module)

    def tensors_of(self, module: StoredModule) -> list[str]:
        """What the module's weight is stored in, and its bias."""
        beside = self._beside(module)
        if self._is_dense(module):
            return dense_tensors(self.header, module) + beside
        return self._tensors(module) + beside + bias_tensors(self.header, module)

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """The plain matrix, or what the format makes of its tensors."""
        if self._is_dense(module):
            self._check_plain(module)
            return read_dense(self.header, module, data)
        weight = self._weight(module, data)
        bias, rule = self._bias(module, data), self._input(module, data)
        return StoredLinear(weight, bias, rule, output_scale=self._output_scale(module, data))

    def _is_dense(self, module: StoredModule) -> bool:
        return module.tensor(self.sign) not in self.header.tensors

    @abstractmethod
    def _scheme(self, module: StoredModule) -> Scheme:
        """The scheme of a quantized module, from headers and config alone."""

    @abstractmethod
    def _tensors(self, module: StoredModule) -> list[str]:
        """The stored tensors of a quantized module but its bias and what ``_beside`` names."""

    @abstractmethod
    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """A quantized module's weight in canonical form."""

    def _beside(self, module: StoredModule) -> list[str]:
        """What may lie beside a weight, plain or not, and has its place there."""
        return []

    def _check_plain(self, module: StoredModule) -> None:  # noqa: B027 (most have nothing to check)
        """A plain weight that is to be read: what lies beside it may speak against that."""

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        return read_bias(self.header, module, data)

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """What a quantized module asks of its input."""
        return None

    def _output_scale(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """Of the scheme's ``output``."""
        return None


def refuse_stack(module: StoredModule, what: str) -> None:
    """E0218 where the module is one of a stack of experts; ``what``: the packing, as in "EXL2's packing"."""
    if module.expert is not None:
        raise LowbitError(
            "E0218",
            f"{module.name}: stacked experts in {what} are not read; use a version with a module for each "
            "expert",
        )
