"""load_engine: from settings to an engine that is ready for requests."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.quality import Quality, read_quality
from lowbit.engine.cuda_graphs import Progress, bucket_sizes
from lowbit.engine.engine import Engine
from lowbit.engine.speculation import Speculation
from lowbit.errors import LowbitError, printable
from lowbit.kernels.device_memory import free_memory, total_memory
from lowbit.settings import Settings
from lowbit.tokenization.fast_tokenizer import FastTokenizer

_log = logging.getLogger("lowbit")

_GIB = 1 << 30


def load_engine(settings: Settings, on_progress: Progress | None = None, *, serving: bool = False) -> Engine:
    """Open, load and set up everything that ``settings`` ask for; ``serving``: for a server."""
    from lowbit.checkpoint import open_checkpoint
    from lowbit.engine import speed
    from lowbit.kernels import native
    from lowbit.loading import Calibration, KernelRules, PackedCache, load_model
    from lowbit.loading.online import is_float
    from lowbit.loading.samples import Samples
    from lowbit.models.config import architecture_of
    from lowbit.quantize.recipe import Asked
    from lowbit.tokenization import check_vocabulary, load_generation_config, load_tokenizer

    if settings.threads is not None:
        native.set_threads(settings.threads)
        torch.set_num_threads(settings.threads)
    asked = Asked.by(settings)  # what is wrong with it is said before anything is read
    Speculation.by(settings)
    bucket_sizes(settings)
    KernelRules.parse(settings.linear_kernel)
    header = open_checkpoint(settings.model, settings.revision, on_progress, load_format=settings.load_format)
    samples = Samples() if speed.wanted(settings.kernel_timings, serving) else None
    with ThreadPoolExecutor(1) as beside:  # while weights are packed, mostly in native code
        tokenizer_read = beside.submit(load_tokenizer, header, settings.tokenizer)
        try:
            model = load_model(
                header,
                device=settings.device,
                dtype=settings.dtype,
                kv_cache_dtype=settings.kv_cache_dtype,
                k_cache_dtype=settings.k_cache_dtype,
                v_cache_dtype=settings.v_cache_dtype,
                activation_quantization=settings.activation_quantization,
                quantization=asked,
                strict=settings.strict,
                kv_scales_path=settings.quantization_param_path,
                on_progress=_stopped_by(tokenizer_read, on_progress),
                samples=samples,
                save=_path(settings.save_quantized),
                calibration=Calibration(_path(settings.calibration_data), settings.tokenizer),
                packed_cache=PackedCache.asked(settings.packed_cache, settings.packed_cache_gb),
                linear_kernel=settings.linear_kernel,
                timings=speed.timings_for(settings.kernel_timings, serving),
            )
        except torch.OutOfMemoryError as error:
            raise _too_large(settings.model, error) from None
        tokenizer = tokenizer_read.result()
    if native.library() is not None and "reference" not in model.kernels:
        # What is left for torch is small, and its own threads, which spin after every operation, would take
        # the cores from the native ones.
        torch.set_num_threads(1)
    check_vocabulary(tokenizer, model.vocab_size)
    stop_ids = load_generation_config(header).stop_ids
    linear = ", ".join(sorted(model.kernels))
    details = {
        "device": str(model.device),
        "kernels": native.describe(),
        "linear layers": linear,
        "quantization": model.quantization,
        "weight bytes": str(model.weight_bytes),
    }
    quality = None if asked.flag and is_float(header) else _quality(header)
    if quality is not None:
        details["quality"] = str(quality)
    engine = Engine(
        model,
        tokenizer,
        settings,
        stop_ids=stop_ids,
        details=details,
        architecture=architecture_of(header),
        quality=quality,
    )
    if serving:
        engine.prepare(on_progress)
    if samples is not None:
        steps = speed.speed_steps(samples, model.device, settings.strict)
        if serving and not settings.strict:  # strict refuses to serve what is slow: that must be known now
            engine.when_idle(steps)
        else:
            for _ in steps:
                pass
    return engine


def _too_large(model: str, error: torch.OutOfMemoryError) -> LowbitError:
    """The error of weights that do not fit on the GPU."""
    device = torch.device("cuda")
    free, total = free_memory(device) / _GIB, total_memory(device) / _GIB
    said = printable(str(error).partition(". ")[0], 200)
    return LowbitError(
        "E0503",
        f"{printable(model)}: the weights do not fit: {free:.1f} of the GPU's {total:.1f} GiB were free when "
        f"loading stopped ({said}); use --quantization, a smaller model, or end what else uses the GPU",
    )


def _stopped_by(other: Future[FastTokenizer], report: Progress | None) -> Progress:
    """``report``, which also ends loading as soon as what runs beside it has failed."""

    def progress(done: int, total: int, what: str) -> None:
        if other.done():
            other.result()
        if report is not None:
            report(done, total, what)

    return progress


def _quality(header: CheckpointHeader) -> Quality | None:
    """What was measured of the model as it is stored; a file without sense is no reason not to serve."""
    try:
        return read_quality(header)
    except LowbitError as error:
        _log.warning("lowbit: the measured quality is left out: %s", error.message)
        return None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
