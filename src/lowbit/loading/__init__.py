"""load_model and plan_model: the only package that knows checkpoints, formats, kernels and models together.

A model family asks for its weights through a ``WeightLoader``. ``loader`` answers by reading and packing,
``planner`` from headers alone, for ``lowbit inspect``. ``names`` knows where a module lies, ``online`` what
quantizing at load makes of it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.embedded import cache_directory
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.kernels.attention import CacheSpec, choose_attention
from lowbit.kernels.gpu import runtime, tuned_sizes
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.loading import choice
from lowbit.loading.kernel_choice import KernelChoice, KernelRules, Timings
from lowbit.loading.loader import Loader, Progress
from lowbit.loading.opened import Opened, Target, check_quantization
from lowbit.loading.options import ModelOptions, model_options
from lowbit.loading.packed_cache import PackedCache
from lowbit.loading.planner import ModelPlan, ModulePlan, Planner
from lowbit.loading.samples import Samples
from lowbit.models.config import extended
from lowbit.models.model import Model
from lowbit.quantize.calibration import Calibration
from lowbit.quantize.recipe import Asked

__all__ = [
    "Calibration",
    "KernelRules",
    "ModelOptions",
    "ModelPlan",
    "ModulePlan",
    "PackedCache",
    "Progress",
    "check_quantization",
    "load_model",
    "model_options",
    "plan_model",
]


_log = logging.getLogger("lowbit")

_LONG_SECONDS = 10.0  # of loading, from which on one may wish for less


def load_model(
    header: CheckpointHeader,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    k_cache_dtype: str = "auto",
    v_cache_dtype: str = "auto",
    activation_quantization: str = "none",
    quantization: Asked | str | None = None,
    strict: bool = False,
    kv_scales_path: str | None = None,
    on_progress: Progress | None = None,
    samples: Samples | None = None,
    save: Path | None = None,
    calibration: Calibration | None = None,
    packed_cache: PackedCache | None = None,
    linear_kernel: str = "auto",
    lm_head_screen: str = "off",
    timings: Timings = "unused",
    parallel: Parallel = ALONE,
    context_length: int | None = None,
) -> Model:
    """Read, fuse and pack every weight of the checkpoint; every stored tensor must find its use.

    ``quantization``: how to quantize a float checkpoint; of a quantized one, what the user believes its
    method is: anything but its own is E0401. ``activation_quantization``: "int8" rounds the inputs of
    weight-only integer layers (``numerics.int8_inputs``). ``strict``: contradictions the data could settle
    are errors. ``kv_scales_path``: a file with scales of the fp8 KV cache, instead of the checkpoint's own.
    ``samples``: gets some rows of each kind of layer, to time. ``save``: the folder the quantized checkpoint
    is left in; ``calibration``: the text calibrated methods look at. ``packed_cache``: where packed weights
    are kept. ``linear_kernel``, ``lm_head_screen``: as the flags; ``timings``: whether those on
    disk may decide for auto. ``parallel``: the rank whose part is loaded; every rank loads at the same time.
    ``context_length``: of the longest sequence there may be, where it is more than the model's own.
    """
    kernels = KernelChoice(KernelRules.parse(linear_kernel), timings)
    kv_dtypes = (kv_cache_dtype, k_cache_dtype, v_cache_dtype)
    target = Target.resolve(header, device, dtype, *kv_dtypes, activation_quantization, kernels, parallel)
    if target.device.type == "cuda":
        runtime.check(target.device)
        runtime.keep_sums_whole()
    tuned_sizes.look_in(cache_directory() / "tuned")
    asked = _resolved(header, quantization, target, strict, kv_scales_path)
    choice.say(asked)
    opened = Opened.of(header, asked, strict)
    if context_length is not None:
        opened = replace(opened, config=extended(opened.config, context_length))
    if _is_written_first(opened, save, calibration, parallel):
        from lowbit.loading.quantizing import quantized_checkpoint  # imports half of lowbit

        made = quantized_checkpoint(opened, save=save, calibration=calibration, on_progress=on_progress)
        model = load_model(
            open_checkpoint(str(made)),
            device=device,
            dtype=dtype,
            k_cache_dtype=target.cache_dtype.k.name,  # as the float model has it
            v_cache_dtype=target.cache_dtype.v.name,
            activation_quantization=activation_quantization,
            strict=strict,
            kv_scales_path=kv_scales_path,
            on_progress=on_progress,
            samples=samples,
            packed_cache=packed_cache,
            linear_kernel=linear_kernel,
            lm_head_screen=lm_head_screen,
            timings=timings,
            context_length=context_length,
        )
    else:
        model = _packed_model(
            opened, target, kv_scales_path, packed_cache, samples, on_progress, lm_head_screen
        )
    model.quantization = opened.described
    return model


def _is_written_first(
    opened: Opened, save: Path | None, calibration: Calibration | None, parallel: Parallel
) -> bool:
    """Whether a quantized checkpoint is made, to be loaded afterwards; what cannot be made is refused."""
    recipe = opened.recipe
    if recipe is None and save is not None:
        raise LowbitError(
            "E0405", "--save-quantized needs a float model and --quantization, --torchao-config or a recipe"
        )
    if calibration is not None and calibration.file and not (recipe and recipe.calibrated):
        raise LowbitError("E0405", "--calibration-data is for methods that calibrate: gptq, awq, marlin")
    if recipe is None or (save is None and not recipe.calibrated):
        return False
    if parallel.size > 1:
        raise LowbitError(
            "E0105",
            "--tp-size: methods that calibrate, and --save-quantized, run in one process: quantize with "
            "--save-quantized FOLDER and without --tp-size first, then serve FOLDER",
        )
    return True


def _packed_model(
    opened: Opened,
    target: Target,
    kv_scales_path: str | None,
    packed_cache: PackedCache | None,
    samples: Samples | None,
    on_progress: Progress | None,
    lm_head_screen: str,
) -> Model:
    """Read or taken from ``packed_cache``, which then keeps what had to be packed."""
    assert packed_cache is None or target.parallel.size == 1, "a file holds a whole model"
    file = None if packed_cache is None else packed_cache.file_of(opened, target, lm_head_screen)
    found = None if file is None else file.read()
    kept, notes = found or (None if file is None else {}, {})
    for code, message in notes.items():
        opened.notes.contradiction(code, message)
    began = time.monotonic()
    with TensorData(opened.header) as data:
        scales = opened.kv_scales(kv_scales_path)
        loader = Loader(opened, target, data, scales, on_progress, samples, kept)
        model = opened.family.build(opened.config, loader)
        loader.refuse_leftovers()
    loader.screen(model, lm_head_screen)
    target.kernels.finish()
    _say_what_stayed(loader)
    _check_caches(model)
    if file is not None and (found is None or loader.outdated):
        file.store(loader.made, opened.notes.said)
    elif packed_cache is None and (seconds := time.monotonic() - began) > _LONG_SECONDS:
        text = "lowbit: loading took %.0f s; --packed-cache on keeps what was made of the weights (%.1f GiB)"
        _log.info(text + " for the next start", seconds, loader.packed_bytes / (1 << 30))
    model.kernels = frozenset(loader.kernels)
    model.weight_bytes = loader.packed_bytes
    model.mapped_bytes = loader.mapped_bytes
    model.spans_tokens = loader.spans_tokens
    model.states = loader.states
    if opened.recipe is not None and (states := opened.recipe.delayed_states) is not None:
        model.states.resume(states)
    return model


def _say_what_stayed(loader: Loader) -> None:
    """Of what was there or asked for: tensors unused, layers not quantized, inputs not rounded."""
    if beside := loader.names.other_parts():
        _log.info("lowbit: %d tensors beside the language model are not used: text only", len(beside))
    if loader.online is not None:
        loader.online.say_kept()
    if loader.target.int8_inputs and not loader.int8_layers:
        _log.warning(
            "lowbit: --activation-quantization int8: no layer here has weights and a kernel that can meet "
            "int8 inputs; all inputs stay as they are"
        )


def plan_model(
    header: CheckpointHeader,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    k_cache_dtype: str = "auto",
    v_cache_dtype: str = "auto",
    activation_quantization: str = "none",
    quantization: Asked | str | None = None,
    strict: bool = False,
    kv_scales_path: str | None = None,
    linear_kernel: str = "auto",
    lm_head_screen: str = "off",
    timings: Timings = "unused",
    threads: int | None = None,
    tp_size: int = 1,
    estimate: bool = True,
) -> ModelPlan:
    """What ``load_model`` would do, without reading a weight; but where it would quantize, a few rows of each
    are looked at to estimate the error. ``threads``: those of timings on disk; None: as many as there are.
    ``tp_size``: the plan is of the first of so many ranks. ``estimate``: whether errors are."""
    kernels = KernelChoice(KernelRules.parse(linear_kernel), timings, threads)
    kv_dtypes = (kv_cache_dtype, k_cache_dtype, v_cache_dtype)
    parallel = Parallel(0, tp_size)
    target = Target.resolve(header, device, dtype, *kv_dtypes, activation_quantization, kernels, parallel)
    asked = _resolved(header, quantization, target, strict, kv_scales_path)
    plan = _planned(header, asked, target, strict, kv_scales_path, estimate, lm_head_screen)
    kernels.finish()
    return plan


def _resolved(
    header: CheckpointHeader,
    quantization: Asked | str | None,
    target: Target,
    strict: bool,
    kv_scales_path: str | None,
) -> Asked:
    """What was asked for, with a method in place of auto."""
    asked = quantization if isinstance(quantization, Asked) else Asked(quantization)
    return choice.resolved(
        header, asked, lambda other: _planned(header, other, target, strict, kv_scales_path, estimate=False)
    )


def _planned(
    header: CheckpointHeader,
    asked: Asked,
    target: Target,
    strict: bool,
    kv_scales_path: str | None,
    estimate: bool = True,
    lm_head_screen: str = "off",
) -> ModelPlan:
    """``estimate``: whether errors are."""
    opened = Opened.of(header, asked, strict)
    with TensorData(header) as data:
        planner = Planner(opened, target, data, opened.kv_scales(kv_scales_path), estimate)
        model = opened.family.build(opened.config, planner)
    planner.refuse_leftovers()
    _check_caches(model)
    weight_bytes = sum(module.nbytes for module in planner.modules)
    screen_bytes, no_screen = planner.screen(opened.config, lm_head_screen)
    return ModelPlan(
        architecture=opened.config.architecture,
        format=opened.form.name,
        described=opened.described,
        config=opened.config,
        modules=planner.modules,
        cache_specs=model.cache_specs(),
        device=planner.device.type,
        choice=asked.chosen,
        peak_bytes=max(planner.peak_bytes, weight_bytes + 2 * screen_bytes),
        screen_bytes=screen_bytes,
        no_screen=no_screen,
    )


def _check_caches(model: Model) -> None:
    """Some kernel serves every cache; else E0420 now, not when the first request comes."""
    for spec in dict.fromkeys(model.cache_specs()):
        if isinstance(spec, CacheSpec):
            choose_attention(spec, model.device)
