"""What tools store of a Linear, in dtypes and shapes, and what they write into the config beside it.

Configs have the keys that published checkpoints have, the ones nobody needs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from formats.real_models import Entries, Model


@dataclass(frozen=True)
class Layout:
    """``of``: (out, in) -> suffix -> (dtype, shape). ``config``: quantization_config, of the model's modules.

    ``documents``: other files. ``bias``: the type of biases; None where they stay in the model's.
    """

    of: Callable[[int, int], Entries]
    config: Callable[[Model], dict | None]
    documents: Callable[[Model], dict[str, dict]] = lambda _: {}
    dtype: str = "BF16"  # of what is left alone
    skipped: Callable[[str], bool] = lambda _: False
    every_bias: bool = False  # modules without a bias get one of zeros
    embedding: bool = False  # the embedding and an untied head are quantized too
    key: str = "quantization_config"
    more: dict[str, object] = field(default_factory=dict)


def _up(number: int, size: int) -> int:
    return -(-number // size)


def _gptq(bits: int = 4, group: int = 128) -> Callable[[int, int], Entries]:
    def of(out: int, columns: int) -> Entries:
        groups = 1 if group == -1 else _up(columns, group)
        return {
            "qweight": ("I32", (columns * bits // 32, out)),
            "qzeros": ("I32", (groups, out * bits // 32)),
            "scales": ("F16", (groups, out)),
            "g_idx": ("I32", (columns,)),
        }

    return of


def _awq(group: int = 128) -> Callable[[int, int], Entries]:
    return lambda out, columns: {
        "qweight": ("I32", (columns, out // 8)),
        "qzeros": ("I32", (columns // group, out // 8)),
        "scales": ("F16", (columns // group, out)),
    }


def _gemv(out: int, columns: int) -> Entries:
    words = _up(columns // 128, 8)
    return {
        "qweight": ("I32", (out, columns // 8)),
        "qzeros": ("I32", (out, words)),
        "scales": ("F16", (out, words * 8)),
    }


def _packed(bits: int = 4, group: int = 128, asymmetric: bool = False, order: bool = False) -> Callable:
    def of(out: int, columns: int) -> Entries:
        found: Entries = {
            "weight_packed": ("I32", (out, _up(columns, 32 // bits))),
            "weight_scale": ("BF16", (out, _up(columns, group))),
            "weight_shape": ("I64", (2,)),
        }
        if asymmetric:
            found["weight_zero_point"] = ("I32", (_up(out, 32 // bits), _up(columns, group)))
        if order:
            found["weight_g_idx"] = ("I32", (columns,))
        return found

    return of


def _fp8_blocks(scale: str = "F32") -> Callable[[int, int], Entries]:
    return lambda out, columns: {
        "weight": ("F8_E4M3", (out, columns)),
        "weight_scale_inv": (scale, (_up(out, 128), _up(columns, 128))),
    }


def _nvfp4(out: int, columns: int) -> Entries:
    return {
        "weight": ("U8", (out, columns // 2)),
        "weight_scale": ("F8_E4M3", (out, columns // 16)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }


def _nvfp4_packed(out: int, columns: int) -> Entries:
    return {
        "weight_packed": ("U8", (out, columns // 2)),
        "weight_scale": ("F8_E4M3", (out, columns // 16)),
        "weight_global_scale": ("F32", (1,)),
        "input_global_scale": ("F32", (1,)),
    }


def _mlx(bits: int = 4, group: int = 64) -> Callable[[int, int], Entries]:
    return lambda out, columns: {
        "weight": ("U32", (out, columns * bits // 32)),
        "scales": ("BF16", (out, columns // group)),
        "biases": ("BF16", (out, columns // group)),
    }


def _hqq(out: int, columns: int) -> Entries:
    groups = out * columns // 64
    found: Entries = {
        "W_q": ("U8", (groups // 2, 64)),
        "scale": ("BF16", (groups, 1)),
        "zero": ("BF16", (groups, 1)),
    }
    return found


def _quanto(out: int, columns: int) -> Entries:
    group = 128
    while columns % group and group > 32:
        group -= 32
    rows = out * columns // group
    return {
        "weight._data._data": ("U8", (_up(rows, 2), group)),
        "weight._scale": ("BF16", (rows, 1)),
        "weight._shift": ("BF16", (rows, 1)),
        "input_scale": ("BF16", ()),
        "output_scale": ("BF16", ()),
    }


def _exl3(out: int, columns: int) -> Entries:
    rows, tiles = _up(columns, 128) * 8, _up(out, 128) * 8
    return {
        "trellis": ("I16", (rows, tiles, 64)),
        "suh": ("F16", (rows * 16,)),
        "svh": ("F16", (tiles * 16,)),
        "mcg": ("I32", ()),
    }


def _exl2(out: int, columns: int) -> Entries:
    return {
        "q_weight": ("I32", (columns * 4 // 32, out)),
        "q_groups": ("I16", (2 * _up(columns, 128),)),
        "q_scale": ("I32", (_up(columns, 128), out // 8)),
        "q_scale_max": ("F16", (_up(columns, 128),)),
        "q_invperm": ("I32", (columns,)),
    }


def _aqlm(out: int, columns: int) -> Entries:
    return {
        "codes": ("I16", (out, columns // 8, 1)),
        "codebooks": ("F16", (1, 65536, 1, 8)),
        "scales": ("F16", (out, 1, 1, 1)),
    }


def _vptq(out: int, columns: int) -> Entries:
    return {
        "centroids.weight": ("F16", (1, 65536 * 8)),
        "res_centroids.weight": ("F16", (1, 256 * 8)),
        "indices": ("I32", (1, _up(out, 8), _up(columns * 24, 32))),
        "perm": ("I16", (columns,)),
        "weight_scale": ("F16", (columns,)),
        "weight_bias": ("F16", (columns,)),
    }


def _quip(out: int, columns: int) -> Entries:
    return {
        "Qidxs": ("I64", (out, columns // 32)),
        "SU": ("F16", (columns,)),
        "SV": ("F16", (out,)),
        "codebook_id": ("I64", ()),
        "Wscale": ("F32", ()),
    }


def _spqr(out: int, columns: int) -> Entries:
    return {
        "dense_weights": ("I64", (out * columns // 16,)),
        "row_offsets": ("I32", (out + 1,)),
        "col_vals": ("I32", (100,)),
        "in_perm": ("I32", (columns // 2,)),
    }


def _bitnet(out: int, columns: int) -> Entries:
    return {"weight": ("U8", (out // 4, columns)), "weight_scale": ("BF16", (1,))}


def _sinq(out: int, columns: int) -> Entries:
    rows = out * columns // 64
    return {
        "W_q": ("U8", (rows // 2, 64)),
        "meta.scale": ("F16", (rows, 1)),
        "meta.zero": ("F16", (rows, 1)),
        "meta.scale2": ("F16", (1, columns)),
    }


def _nf4(out: int, columns: int) -> Entries:
    count = out * columns
    return {
        "weight": ("U8", (count // 2, 1)),
        "weight.absmax": ("U8", (count // 64,)),
        "weight.nested_absmax": ("F32", (_up(count // 64, 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (120,)),
    }


def _quark_int4(out: int, columns: int) -> Entries:
    return {"weight": ("I32", (columns, out // 8)), "weight_scale": ("BF16", (columns // 128, out))}


def _marlin24(out: int, columns: int) -> Entries:
    return {
        "weight_packed": ("I32", (columns // 32, out * 2)),
        "scale_packed": ("F16", (_up(columns, 128), out)),
        "meta": ("I16", (columns // 32, out * 2)),
    }


def _qqq(out: int, columns: int) -> Entries:
    return {
        "B": ("I32", (columns // 16, out * 2)),
        "s_channel": ("F32", (1, out)),
        "s_group": ("F16", (columns // 128, out)),
    }


def _of_tensor(*scales: str) -> Callable[[int, int], Entries]:
    def of(out: int, columns: int) -> Entries:
        return {"weight": ("F8_E4M3", (out, columns))} | dict.fromkeys(scales, ("F32", ()))

    return of


def _of_rows(dtype: str, scale: str = "F32") -> Callable[[int, int], Entries]:
    return lambda out, columns: {"weight": (dtype, (out, columns)), "weight_scale": (scale, (out, 1))}


def _ct(weights: dict, fmt: str, inputs: dict | None = None, ignore: tuple[str, ...] = ("lm_head",)) -> dict:
    whole = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {
        "input_activations": None if inputs is None else whole | {"observer": None} | inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": whole | weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": fmt,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _gptq_config(**more: object) -> Callable[[Model], dict]:
    return lambda _: {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        **more,
    }


def _awq_config(**more: object) -> Callable[[Model], dict]:
    return lambda _: {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
        **more,
    }


def _vptq_config(model: Model) -> dict:
    layer = {
        "enable_norm": True,
        "enable_perm": True,
        "group_num": 1,
        "indices_as_float": False,
        "is_indice_packed": True,
        "num_centroids": [-1, 65536],
        "num_res_centroids": [-1, 256],
        "outlier_size": 0,
        "vector_lens": [-1, 8],
        "vector_quant_dim": "out",
    }
    return {
        "quant_method": "vptq",
        "config_for_layers": {
            name: layer | {"group_size": columns, "in_features": columns, "out_features": out, "bias": None}
            for name, (out, columns) in model.linears.items()
        },
    }


def _modelopt(algo: str, **more: object) -> Callable[[Model], dict[str, dict]]:
    inner = {"quant_algo": algo, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **more}
    producer = {"name": "modelopt", "version": "0.23.0"}
    return lambda _: {"hf_quant_config": {"producer": producer, "quantization": inner}}


def _quark_config(weight: dict, inputs: dict | None = None) -> dict:
    whole = {
        "block_size": None,
        "ch_axis": None,
        "dtype": "fp8_e4m3",
        "group_size": None,
        "is_dynamic": False,
        "observer_cls": "PerTensorMinMaxObserver",
        "qscheme": "per_tensor",
        "round_method": "half_even",
        "scale_type": "float",
        "symmetric": None,
    }
    return {
        "algo_config": None,
        "exclude": ["lm_head"],
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": {
            "bias": None,
            "input_tensors": None if inputs is None else whole | inputs,
            "output_tensors": None,
            "target_device": None,
            "weight": whole | weight,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
    }


_BNB = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "vision_tower"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_FP8_GROUP = {"num_bits": 8, "type": "float"}
_INT8_ROWS = {"num_bits": 8, "strategy": "channel"}
LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(_gptq(), _gptq_config(), dtype="F16"),
    "gptq-qwen": Layout(_gptq(), _gptq_config(), dtype="F16", every_bias=True),
    "gptq-order": Layout(_gptq(), _gptq_config(desc_act=True, sym=False, damp_percent=0.1), dtype="F16"),
    "gptq-8bit": Layout(_gptq(8), _gptq_config(bits=8), dtype="F16"),
    "gptq-rows": Layout(_gptq(4, -1), _gptq_config(group_size=-1), dtype="F16"),
    "gptq-gptqmodel": Layout(
        _gptq(),
        _gptq_config(
            checkpoint_format="gptq",
            pack_dtype="int32",
            lm_head=False,
            meta={"quantizer": ["gptqmodel:4.0.0-dev"], "uri": "", "mse": 0.0},
            dynamic={},
        ),
    ),
    "gptq-old": Layout(
        _gptq(),
        lambda _: None,
        lambda _: {"quantize_config": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}},
        dtype="F16",
    ),
    "awq": Layout(_awq(), _awq_config(), dtype="F16"),
    "awq-32": Layout(_awq(32), _awq_config(group_size=32), dtype="F16"),
    "awq-gemv": Layout(_gemv, _awq_config(version="gemv"), dtype="F16"),
    "awq-old": Layout(
        _awq(),
        lambda _: None,
        lambda _: {"quant_config": {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}},
        dtype="F16",
    ),
    "auto-round": Layout(
        _gptq(),
        lambda m: {
            "autoround_version": "0.4.6",
            "bits": 4,
            "block_name_to_quantize": "model.layers",
            "data_type": "int",
            "group_size": 128,
            "packing_format": "auto_round:auto_gptq",
            "quant_method": "auto-round",
            "sym": True,
            "iters": 1000,
        },
        dtype="F16",
    ),
    "ct-w4a16": Layout(_packed(), lambda _: _ct({"group_size": 128}, "pack-quantized")),
    "ct-w4a16-asym": Layout(
        _packed(asymmetric=True), lambda _: _ct({"group_size": 128, "symmetric": False}, "pack-quantized")
    ),
    "ct-w4a16-order": Layout(
        _packed(order=True), lambda _: _ct({"group_size": 128, "actorder": "group"}, "pack-quantized")
    ),
    "ct-w8a8": Layout(
        _of_rows("I8", "BF16"),
        lambda _: _ct(_INT8_ROWS, "int-quantized", {"num_bits": 8, "strategy": "token", "dynamic": True}),
    ),
    "ct-fp8": Layout(
        lambda out, columns: (
            {"weight": ("F8_E4M3", (out, columns))}
            | dict.fromkeys(("weight_scale", "input_scale"), ("BF16", (1,)))
        ),
        lambda _: _ct(
            _FP8_GROUP | {"strategy": "tensor"}, "float-quantized", _FP8_GROUP | {"strategy": "tensor"}
        ),
    ),
    "ct-fp8-dynamic": Layout(
        _of_rows("F8_E4M3", "BF16"),
        lambda _: _ct(
            _FP8_GROUP | {"strategy": "channel"},
            "float-quantized",
            _FP8_GROUP | {"strategy": "token", "dynamic": True},
        ),
    ),
    "ct-fp8-block": Layout(
        lambda out, columns: {
            "weight": ("F8_E4M3", (out, columns)),
            "weight_scale": ("BF16", (_up(out, 128), _up(columns, 128))),
        },
        lambda _: _ct(
            _FP8_GROUP | {"strategy": "block", "block_structure": [128, 128]},
            "float-quantized",
            _FP8_GROUP | {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
    ),
    "ct-nvfp4": Layout(
        _nvfp4_packed,
        lambda _: _ct(
            {"type": "float", "strategy": "tensor_group", "group_size": 16},
            "nvfp4-pack-quantized",
            {"type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        ),
    ),
    "ct-marlin24": Layout(_marlin24, lambda _: _ct({"group_size": 128}, "marlin-24"), dtype="F16"),
    "qqq": Layout(
        _qqq,
        lambda _: {
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "quant_method": "qqq",
            "wbits": 4,
        },
        dtype="F16",
    ),
    "fp8-block": Layout(
        _fp8_blocks(),
        lambda _: {**_FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]},
    ),
    "fp8-static": Layout(
        _of_tensor("weight_scale", "input_scale"),
        lambda _: {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    ),
    "fbgemm": Layout(
        _of_rows("F8_E4M3"),
        lambda m: {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": [name for name in m.linears if "self_attn" in name] + ["lm_head"],
            "quant_method": "fbgemm_fp8",
        },
        skipped=lambda name: "self_attn" in name,
    ),
    "modelopt-fp8": Layout(
        _of_tensor("weight_scale", "input_scale"), lambda _: None, _modelopt("FP8"), dtype="F16"
    ),
    "modelopt-nvfp4": Layout(_nvfp4, lambda _: None, _modelopt("NVFP4", group_size=16)),
    "mlx": Layout(
        _mlx(), lambda _: {"group_size": 64, "bits": 4}, key="quantization", embedding=True, dtype="BF16"
    ),
    "bnb": Layout(_nf4, lambda _: _BNB),
    "hqq": Layout(
        _hqq,
        lambda m: {
            "quant_config": {
                "offload_meta": False,
                "scale_quant_params": None,
                "zero_quant_params": None,
                "weight_quant_params": {
                    "axis": 1,
                    "channel_wise": True,
                    "group_size": 64,
                    "nbits": 4,
                    "optimize": True,
                    "round_zero": True,
                    "view_as_float": False,
                },
            },
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        },
    ),
    "quanto": Layout(
        _quanto,
        lambda _: None,
        lambda m: {"quanto_qmap": {key: {"weights": "qint4", "activations": "none"} for key in m.linears}},
    ),
    "exl2": Layout(
        _exl2,
        lambda _: {
            "quant_method": "exl2",
            "version": "0.0.21",
            "bits": 4.0,
            "head_bits": 6,
            "calibration": {"rows": 115, "length": 2048, "dataset": "(default)"},
        },
        dtype="F16",
    ),
    "exl3": Layout(
        _exl3,
        lambda _: {
            "quant_method": "exl3",
            "version": "0.0.1",
            "bits": 4.0,
            "head_bits": 6,
            "calibration": {"rows": 100, "cols": 2048},
            "out_scales": "auto",
        },
        dtype="F16",
    ),
    "aqlm": Layout(
        _aqlm,
        lambda _: {
            "in_group_size": 8,
            "linear_weights_not_to_quantize": ["model.embed_tokens.weight", "lm_head.weight"],
            "nbits_per_codebook": 16,
            "num_codebooks": 1,
            "out_group_size": 1,
            "quant_method": "aqlm",
        },
        dtype="F16",
    ),
    "vptq": Layout(_vptq, _vptq_config),
    "quip_sharp": Layout(
        _quip,
        lambda _: {
            "codebook": "E8P12",
            "codebook_version": 1,
            "codesz": 8,
            "idx_dtype": "torch.int64",
            "lora_rank": 0,
            "packsz": 4,
            "rescale_WH": False,
            "resid_scale_override": -1,
            "model_version": 1,
        },
        dtype="F16",
        key="quip_params",
    ),
    "spqr": Layout(
        _spqr,
        lambda m: {
            "beta1": 16,
            "beta2": 16,
            "bits": 3,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "spqr",
            "shapes": {f"{name}.col_vals.shape": 100 for name in m.linears},
        },
        dtype="F16",
    ),
    "bitnet": Layout(
        _bitnet,
        lambda _: {
            "linear_class": "autobitlinear",
            "modules_to_not_convert": None,
            "quant_method": "bitnet",
            "quantization_mode": "offline",
            "rms_norm_eps": 1e-6,
            "use_rms_norm": False,
        },
    ),
    "sinq": Layout(
        _sinq,
        lambda _: {
            "quant_method": "sinq",
            "nbits": 4,
            "group_size": 64,
            "tiling_mode": "1D",
            "method": "sinq",
            "modules_to_not_convert": ["lm_head"],
        },
        lambda m: {
            "model.safetensors.index.json.meta": {
                name: {"meta": {"nbits": 4, "method": "sinq", "group_size": 64, "shape": list(shape)}}
                for name, shape in m.linears.items()
            }
        },
    ),
    "quark-fp8": Layout(
        _of_tensor("weight_scale", "input_scale"),
        lambda _: _quark_config({}, {}),
    ),
    "quark-int4": Layout(
        _quark_int4,
        lambda _: _quark_config(
            {
                "dtype": "int4",
                "qscheme": "per_group",
                "group_size": 128,
                "ch_axis": 1,
                "symmetric": True,
                "observer_cls": "PerGroupMinMaxObserver",
            }
        ),
    ),
}


def stored(layout: Layout, model: Model) -> Entries:
    """All tensors of the model in this layout."""
    found: Entries = {}
    linears = dict(model.linears)
    plain = dict(model.plain)
    if layout.embedding:
        for name, (_, shape) in model.plain.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                linears[name.removesuffix(".weight")] = (shape[0], shape[1])
                del plain[name]
    for name, (out, columns) in linears.items():
        if layout.skipped(name):
            found[f"{name}.weight"] = (layout.dtype, (out, columns))
        else:
            found |= {f"{name}.{suffix}": entry for suffix, entry in layout.of(out, columns).items()}
        if name in model.biases or (layout.every_bias and name in model.linears):
            found[f"{name}.bias"] = (layout.dtype, (out,))
    for name, (dtype, shape) in plain.items():
        found[name] = (layout.dtype if dtype == "BF16" else dtype, shape)
    return found


def config_of(layout: Layout, model: Model) -> dict:
    """config.json."""
    said = layout.config(model)
    extra = {} if said is None else {layout.key: said}
    if layout.key == "quantization" and said is not None:
        extra["quantization_config"] = said
    return {**model.config, **extra, **layout.more}
