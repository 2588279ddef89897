"""gpu_humming: linear layers by the package humming-kernels (pip install 'lowbit[humming]'), where asked for.

What it takes ``humming_form`` says. The package lays weights out for the GPU's instructions and keeps no
way back: there is no ``unpack`` and no ``rows``. Numbers whose group has a f16 or bf16 scale are multiplied
with it in x's type, which rounds them, before they meet x; scales of rows meet the float32 sums.

Its kernels are compiled for a layer's sizes, for all numbers of tokens at once, when the first weight of
those sizes is packed: nothing is compiled or chosen while a CUDA graph is captured. Before that a small
weight of the same kind is multiplied and compared; what fails is not used.

**Nothing here has run on a GPU**, and it has not been timed beside gpu_blocks: it runs by its name only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.gpu import trial
from lowbit.kernels.gpu.humming_form import Form, form_of, tensors_of
from lowbit.kernels.linear_kernel import PackedWeight, Use
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_LOCKS = 2048  # counters by which its programs that split columns wait for each other


@dataclass(frozen=True)
class HummingWeight(PackedWeight):
    """A weight of ``GpuHumming`` with the package's description of the layer."""

    config: Any = field(kw_only=True, repr=False)


class GpuHumming:
    """See the module docstring."""

    name = "gpu_humming"
    computes = "as stored"
    layout = 1
    steady = False
    runs = "quantized"
    looks_up = False

    def serves(self, device: torch.device) -> bool:
        """GPUs."""
        return device.type == "cuda"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the package cannot hold the scheme, or does not run here, or None."""
        if not self.serves(device):
            return f"needs an NVIDIA GPU, got {device.type}"
        if find_spec("humming") is None:
            return "humming-kernels is not installed (pip install 'lowbit[humming]')"
        form = form_of(scheme, shape)
        if isinstance(form, str):
            return form
        least = (7, 5) if form.inputs is torch.float16 else (8, 0)
        found = torch.cuda.get_device_capability(device)
        if found < least:
            needs, has = (".".join(map(str, one)) for one in (least, found))
            return f"needs compute capability {needs} for {form.inputs} inputs, got {has}"
        return None

    def unfit(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device, use: Use) -> str | None:
        """What else keeps it from the weight: no lookups, x of another type, or a trial that failed."""
        form = form_of(scheme, shape)
        assert isinstance(form, Form), "refuses() was asked first"
        if use.lookup:
            return "rows cannot be looked up in its layout"
        if use.inputs not in (None, form.inputs):
            wanted, given = (str(dtype).removeprefix("torch.") for dtype in (form.inputs, use.inputs))
            scale = scheme.scales[0].name
            return f"{scale} scales need {wanted} inputs, the model's are {given}: --dtype {wanted}"
        columns = max(4 * form.group, 512)
        blocks = ((scheme.blocks[0][0], form.group), *scheme.blocks[1:])
        kind = replace(scheme, blocks=blocks)
        return trial.fault(self.name, kind, device, lambda: _trial(kind, columns, device))

    def rounds(self, scheme: Scheme) -> bool:
        """Where a group's f16 or bf16 scale meets the number before the product: to x's type."""
        return bool(scheme.blocks[0][1]) and scheme.scales[0].name in ("f16", "bf16")

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """The scheme's own bytes."""
        return round(scheme.bits_per_weight(shape) * shape[-2] * shape[-1] / 8)

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Never: x stays a float."""
        return False

    def pack(self, weight: QuantizedTensor, device: torch.device) -> HummingWeight:
        """What the package makes of the tensors; E0414 for a zero point that its bits cannot hold."""
        from humming.transform import transform_humming_tensors

        form = form_of(weight.scheme, weight.shape)
        assert isinstance(form, Form), "refuses() was asked first"
        config = _config(form, weight.shape, device)
        made = transform_humming_tensors(config, tensors_of(weight, form, device))
        return self.restore(weight.scheme, weight.shape, made, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> HummingWeight:
        """The weight around its buffers, and its kernels compiled."""
        form, matrix = form_of(scheme, shape), buffers.get("weight")
        if isinstance(form, str) or matrix is None:
            raise ValueError(f"{origin}: no buffers of {scheme}")
        device = matrix.device
        # Counters are a layer's own: layers may run side by side.
        buffers = {**buffers, "locks": torch.zeros(_LOCKS, dtype=torch.int32, device=device)}
        config = _config(form, shape, device)
        packed = HummingWeight(self, scheme, shape, buffers, origin, config=config, inputs=form.inputs)
        self.linear(torch.zeros(1, shape[1], dtype=form.inputs, device=device), packed)
        return packed

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """E0414: the package lays weights out for good."""
        raise LowbitError("E0414", f"{packed.origin}: {self.name} cannot give a weight back; use gpu_blocks")

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) of the scales' type, or float32, which is rounded to it -> (tokens, out).

        The result has x's type, or ``out``'s; it was rounded to the scales' type.
        """
        from humming.forward import humming_forward

        assert isinstance(packed, HummingWeight), "packed by this kernel"
        (tokens, columns), (rows, wanted) = x.shape, packed.shape
        if columns != wanted:
            raise LowbitError("E0703", f"{packed.origin}: input has {columns} columns, weight {wanted}")
        if x.dtype not in (packed.inputs, torch.float32):
            raise LowbitError("E0414", f"{packed.origin}: {self.name} takes {packed.inputs} x, got {x.dtype}")
        if out is None:
            out = x.new_empty(tokens, rows)
        if not tokens:
            return out
        aligned = out.is_contiguous() and out.data_ptr() % 16 == 0  # as bulk stores need it
        direct = aligned and out.dtype is packed.inputs
        y = out if direct else torch.empty(tokens, rows, dtype=packed.inputs, device=x.device)
        named = packed.buffers
        humming_forward(
            packed.config,
            inputs=x.to(packed.inputs).contiguous(),
            weight=named["weight"],
            weight_scale=named["weight_scale"],
            zero_point=named.get("zero_point"),
            weight_scale_2=named.get("weight_scale_2"),
            outputs=y,
            locks=named["locks"],
        )
        return out if direct else out.copy_(y)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """E0414, as ``unpack``."""
        return self.unpack(packed).dequantize()


def _config(form: Form, shape: tuple[int, ...], device: torch.device) -> Any:
    """The package's description of a layer on this GPU."""
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    schema = HummingWeightSchema(
        b_dtype=form.codes,
        bs_dtype=form.scales,
        weight_scale_group_size=form.group,
        weight_scale_type="tensor" if form.whole else "group" if form.group else "channel",
        weight_scale_2_type="tensor" if form.second else None,
        has_zero_point=form.zeros,
    )
    return prepare_layer_config(
        shape_n=shape[0], shape_k=shape[1], weight_schema=schema, torch_dtype=form.inputs, device=device
    )


def _trial(scheme: Scheme, columns: int, device: torch.device) -> str:
    """Products of a small random weight beside its definition's."""
    kernel, weight = GpuHumming(), trial.random_weight(scheme, (128, columns))
    packed, dense = kernel.pack(weight, device), weight.dequantize()
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    x = x.to(packed.inputs).float()
    wanted, size = x @ dense.T, x.norm(dim=1)[:, None] * dense.norm(dim=1)
    for tokens in (1, 40):
        y = kernel.linear(x[:tokens].to(device, packed.inputs), packed).float().cpu()
        if found := trial.differs(y, wanted[:tokens], size[:tokens], 5e-3):
            return found
    return ""
