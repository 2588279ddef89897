"""Stand-ins for humming-kernels 0.1.20 and FlashInfer 0.7.4: their signatures, computed in torch.

Written from the packages' documented signatures and shapes. Wrong shapes, types and devices are errors, as
there; laid-out weights are turned upside down, so that nothing passes that reads them as what was given.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.numerics.number_formats import number_format


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


def stream(words: Tensor, bits: int) -> Tensor:
    """int32 (rows, words) -> int64 (rows, codes): a little-endian stream of bits a row."""
    rows = []
    for row in words.tolist():
        number = sum((word & 0xFFFFFFFF) << 32 * at for at, word in enumerate(row))
        rows.append([number >> bits * at & (1 << bits) - 1 for at in range(32 * len(row) // bits)])
    return torch.tensor(rows)


@dataclass(kw_only=True)
class WeightSchema:
    b_dtype: str
    bs_dtype: str | None = None
    weight_scale_group_size: int = 0
    weight_scale_group_size_n: int = 0
    weight_scale_type: str | None = None
    weight_scale_2_type: str | None = None
    has_zero_point: bool = False
    is_fp_zero_point: bool = False
    hadamard_block_size: int = 0


@dataclass(frozen=True)
class LayerConfig:
    rows: int
    columns: int
    schema: WeightSchema
    dtype: torch.dtype


def prepare_layer_config(
    shape_n: int,
    shape_k: int,
    weight_schema: WeightSchema,
    input_schema: None = None,
    num_experts: int | None = None,
    pad_n_to_multiple: int = 1,
    pad_k_to_multiple: int = 1,
    has_bias: bool = False,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    tensors: dict[str, Tensor] | None = None,
    allow_inplace: bool = False,
) -> LayerConfig:
    assert torch_dtype in (torch.float16, torch.bfloat16) and device is not None
    scales = weight_schema.bs_dtype
    if scales in ("float16", "bfloat16"):
        assert scales == str(torch_dtype).removeprefix("torch."), "16-bit scales have x's type"
    return LayerConfig(shape_n, shape_k, weight_schema, torch_dtype)


_SCALES = {
    "float8e8m0": torch.float8_e8m0fnu,
    "float8e4m3": torch.float8_e4m3fn,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def transform_humming_tensors(
    config: LayerConfig,
    tensors: dict[str, Tensor],
    already_padded: bool = False,
    allow_inplace: bool = False,
) -> dict[str, Tensor]:
    schema, rows, columns = config.schema, config.rows, config.columns
    bits = int(re.findall(r"\d+", schema.b_dtype)[0])
    groups = columns // schema.weight_scale_group_size if schema.weight_scale_group_size else 1
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((rows, columns * bits // 32), torch.int32)
    }
    if schema.weight_scale_type == "tensor":
        wanted["weight_scale"] = ((1,), torch.float32)
    else:
        assert (schema.weight_scale_type == "group") == (schema.weight_scale_group_size > 0)
        wanted["weight_scale"] = ((rows, groups), _SCALES[str(schema.bs_dtype)])
    if schema.has_zero_point:
        wanted["zero_point"] = ((rows * bits // 32, groups), torch.int32)
    if schema.weight_scale_2_type == "tensor":
        wanted["weight_scale_2"] = ((1,), torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == wanted
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return {name: tensor.view(torch.uint8).flip(0) for name, tensor in tensors.items()}


def _dense(config: LayerConfig, tensors: dict[str, Tensor | None]) -> Tensor:
    schema = config.schema

    def back(name: str, dtype: torch.dtype) -> Tensor:
        found = tensors[name]
        assert found is not None
        return found.flip(0).contiguous().view(dtype)

    bits = int(re.findall(r"\d+", schema.b_dtype)[0])
    codes = stream(back("weight", torch.int32), bits)
    if schema.b_dtype.startswith("uint"):
        numbers = codes.float()
        if schema.has_zero_point:
            zeros = stream(back("zero_point", torch.int32).T, bits).T.float()
            numbers -= zeros.repeat_interleave(config.columns // zeros.shape[1], 1)
        else:
            numbers -= 1 << (bits - 1)
    else:
        numbers = number_format(re.sub(r"^float\d", "", schema.b_dtype)).table()[codes]
    if schema.weight_scale_type == "tensor":
        return numbers * back("weight_scale", torch.float32)
    scale = back("weight_scale", _SCALES[str(schema.bs_dtype)]).float()
    numbers = numbers * scale.repeat_interleave(config.columns // scale.shape[1], 1)
    return numbers if tensors["weight_scale_2"] is None else numbers * back("weight_scale_2", torch.float32)


def humming_forward(
    config: LayerConfig,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale_2: Tensor | None = None,
    outputs: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_scale_2: Tensor | None = None,
    locks: Tensor | None = None,
    compute_config: str | None = None,
    tuning_config: str | None = None,
) -> Tensor:
    assert inputs.dtype is config.dtype and inputs.is_contiguous() and inputs.shape[0] > 0
    assert locks is not None and locks.shape == (2048,) and locks.dtype is torch.int32 and not locks.any()
    assert outputs is not None and outputs.is_contiguous() and outputs.dtype is config.dtype
    tensors = {
        "weight": weight,
        "weight_scale": weight_scale,
        "zero_point": zero_point,
        "weight_scale_2": weight_scale_2,
    }
    return outputs.copy_(inputs.float() @ _dense(config, tensors).T)


def install_humming(monkeypatch: pytest.MonkeyPatch, forward: Any = humming_forward) -> None:
    install(monkeypatch, "humming")
    install(monkeypatch, "humming.schema", HummingWeightSchema=WeightSchema)
    transform = {
        "prepare_layer_config": prepare_layer_config,
        "transform_humming_tensors": transform_humming_tensors,
    }
    install(monkeypatch, "humming.transform", **transform)
    install(monkeypatch, "humming.forward", humming_forward=forward)


class _Paged:
    """What both of FlashInfer's wrappers do: attention head by head over pages (page, token, head, dim)."""

    def __init__(self) -> None:
        self.plans = 0

    def _plan(
        self,
        queries: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last: Tensor,
        heads: tuple[int, int],
        head_dim: int,
        page_size: int,
        window_left: int,
        logits_soft_cap: float,
        dtypes: tuple[torch.dtype, torch.dtype],
        sm_scale: float,
    ) -> None:
        for tensor in (queries, indptr, indices, last):
            assert tensor.dtype is torch.int32 and tensor.dim() == 1
        assert queries.device.type == indptr.device.type == last.device.type == "cpu"
        assert len(queries) == len(indptr) == len(last) + 1 and len(indices) == int(indptr[-1])
        assert (
            (last >= 1).all() and (last <= page_size).all() and dtypes[0] in (torch.float16, torch.bfloat16)
        )
        self.plans += 1
        self._at = queries.tolist(), indptr.tolist(), indices.long(), last.tolist()
        self._shape = heads, head_dim, page_size
        self._how = window_left, logits_soft_cap, dtypes, sm_scale

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        (starts, indptr, indices, last), ((heads, kv_heads), dim, size) = self._at, self._shape
        window, softcap, (q_type, kv_type), scale = self._how
        k, v = paged_kv_cache
        assert q.dtype is q_type and k.dtype is kv_type and v.dtype is kv_type
        assert q.shape == (starts[-1], heads, dim) and k.shape[1:] == (size, kv_heads, dim)
        result = torch.full_like(q, torch.nan)
        for row, final in enumerate(last):
            pages = indices[indptr[row] : indptr[row + 1]]
            keys, values = (
                part.float()[pages].flatten(0, 1)[: (len(pages) - 1) * size + final] for part in (k, v)
            )
            first, end = starts[row], starts[row + 1]
            place = torch.arange(end - first)[:, None] + len(keys) - (end - first)
            key = torch.arange(len(keys))
            seen = key <= place
            if window >= 0:
                seen &= key >= place - window
            for head in range(heads):
                kv_head = head * kv_heads // heads
                scores = q[first:end, head].float() @ keys[:, kv_head].T * scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                result[first:end, head] = (weights @ values[:, kv_head]).to(q.dtype)
        return result


class Decode(_Paged):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool = False
    ):
        super().__init__()
        assert kv_layout == "NHD" and float_workspace_buffer.nbytes >= 128 << 20
        self._tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert self._tensor_cores or num_qo_heads // num_kv_heads < 4
        self._plan(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            (num_qo_heads, num_kv_heads),
            head_dim,
            page_size,
            window_left,
            logits_soft_cap,
            (q_data_type, kv_data_type),
            sm_scale,
        )


class Prefill(_Paged):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD"):
        super().__init__()
        assert kv_layout == "NHD" and float_workspace_buffer.nbytes >= 128 << 20

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert causal
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            (num_qo_heads, num_kv_heads),
            head_dim_qk,
            page_size,
            window_left,
            logits_soft_cap,
            (q_data_type, kv_data_type),
            sm_scale,
        )


def install_flashinfer(monkeypatch: pytest.MonkeyPatch, **members: object) -> None:
    wrappers = {"BatchDecodeWithPagedKVCacheWrapper": Decode, "BatchPrefillWithPagedKVCacheWrapper": Prefill}
    install(monkeypatch, "flashinfer", **{**wrappers, **members})
