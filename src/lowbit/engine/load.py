"""load_engine: from settings to an engine that is ready for requests."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.quality import Quality, read_quality
from lowbit.engine.cuda_graphs import Progress, bucket_sizes
from lowbit.engine.engine import Engine
from lowbit.engine.memory import running_requests
from lowbit.engine.rank_process import device_of, set_threads
from lowbit.engine.ranks import Ranks
from lowbit.engine.shared_model import SharedModel
from lowbit.engine.speculation import Speculation
from lowbit.errors import LowbitError, printable, thousands
from lowbit.kernels import native
from lowbit.kernels.device_memory import free_memory, has_gpu, total_memory
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.models.model import Model
from lowbit.settings import Settings
from lowbit.tokenization.fast_tokenizer import FastTokenizer

if TYPE_CHECKING:
    from lowbit.loading.samples import Samples
    from lowbit.quantize.recipe import Asked

_log = logging.getLogger("lowbit")

_GIB = 1 << 30


def load_engine(settings: Settings, on_progress: Progress | None = None, *, serving: bool = False) -> Engine:
    """Open, load and set up everything that ``settings`` ask for; ``serving``: for a server.

    With ``tp_size`` it starts the other ranks, which load at the same time, and ends them where it fails.
    """
    from lowbit.checkpoint import open_checkpoint
    from lowbit.loading import KernelRules
    from lowbit.quantize.recipe import Asked

    asked = Asked.by(settings)  # what is wrong with it is said before anything is read
    Speculation.by(settings)
    bucket_sizes(settings)
    KernelRules.parse(settings.linear_kernel)
    header = open_checkpoint(settings.model, settings.revision, on_progress, load_format=settings.load_format)
    set_threads(settings)
    settings = _with_limit(settings, header)
    if settings.tp_size == 1:
        return _engine(settings, header, asked, on_progress, serving, None)
    settings = _shared(settings)
    ranks = Ranks(settings)
    try:
        _check_cuts(settings, header, asked)  # while the others start
        ranks.meet()
        return _engine(settings, header, asked, on_progress, serving, ranks)
    except BaseException:
        ranks.close()
        raise


def _with_limit(settings: Settings, header: CheckpointHeader) -> Settings:
    """With the number of sequences that run at once, which all ranks must know alike."""
    from lowbit.models.registry import family_of

    device = device_of(settings, 0)
    if device.type == "cuda" and not has_gpu():
        return settings  # which loading refuses
    states = getattr(family_of(header).config_of(header), "state", None) is not None
    running = running_requests(settings, device, states)
    return replace(settings, max_running_requests=running)


def _shared(settings: Settings) -> Settings:
    """Without what is for one process alone: what several start to compute at once is not timed, and a sum
    between processes is in no plan of native calls."""
    off = []
    if settings.packed_cache != "off":
        off.append("--packed-cache (each rank packs its own part)")
    if settings.kernel_timings == "on":
        off.append("--kernel-timings (the ranks would time each other)")
    if not settings.disable_cuda_graph and device_of(settings, 0).type == "cpu":
        off.append("captured steps (sums between ranks are no part of them)")
    for one in off:
        _log.info("lowbit: off with --tp-size %d: %s", settings.tp_size, one)
    return replace(settings, packed_cache="off", kernel_timings="off")


def _check_cuts(settings: Settings, header: CheckpointHeader, asked: Asked) -> None:
    """E0430, E0431 where so many ranks cannot share the model."""
    from lowbit.loading import model_options, plan_model

    plan_model(
        header,
        **model_options(settings),
        quantization=asked,
        tp_size=settings.tp_size,
        estimate=False,
    )


def load_part(
    settings: Settings,
    header: CheckpointHeader,
    asked: Asked,
    parallel: Parallel,
    on_progress: Progress | None = None,
    samples: Samples | None = None,
    serving: bool = False,
) -> Model:
    """The model as ``settings`` ask for it, or a rank's part of it."""
    from lowbit.engine import speed
    from lowbit.loading import Calibration, PackedCache, load_model, model_options

    return load_model(
        header,
        **model_options(settings),
        quantization=asked,
        on_progress=on_progress,
        samples=samples,
        save=_path(settings.save_quantized),
        calibration=Calibration(_path(settings.calibration_data), settings.tokenizer),
        packed_cache=PackedCache.asked(settings.packed_cache, settings.packed_cache_gb),
        timings=speed.timings_for(settings.kernel_timings, serving),
        parallel=parallel,
        context_length=settings.context_length,
    )


def _engine(
    settings: Settings,
    header: CheckpointHeader,
    asked: Asked,
    on_progress: Progress | None,
    serving: bool,
    ranks: Ranks | None,
) -> Engine:
    from lowbit.engine import speed
    from lowbit.loading.online import is_float
    from lowbit.loading.samples import Samples
    from lowbit.models.config_keys import architecture_of
    from lowbit.tokenization import load_generation_config

    beyond = _beyond_context(settings, header)
    samples = Samples() if speed.wanted(settings.kernel_timings, serving) else None
    with ThreadPoolExecutor(1) as beside:  # while weights are packed, mostly in native code
        tokenizer_read = beside.submit(_fitting_tokenizer, settings, header)
        report = _stopped_by(tokenizer_read, ranks, on_progress)
        parallel = ALONE if ranks is None else ranks.parallel
        try:
            model = load_part(settings, header, asked, parallel, report, samples, serving)
        except torch.OutOfMemoryError as error:
            raise _too_large(settings.model, error) from None
        tokenizer = tokenizer_read.result()
    if ranks is not None:
        model = SharedModel(model, ranks, ranks.wait_until_ready())
    if native.library() is not None and "reference" not in model.kernels:
        # What is left for torch is small, and its own threads, which spin after every operation, would take
        # the cores from the native ones.
        torch.set_num_threads(1)
    stop_ids = load_generation_config(header).stop_ids
    linear = ", ".join(sorted(model.kernels))
    details = {
        "device": str(model.device) if ranks is None else f"{model.device.type}, {ranks.size} ranks",
        "kernels": native.describe(),
        "linear layers": linear,
        "quantization": model.quantization,
        "weight bytes": str(model.weight_bytes),
    }
    if beyond:
        details["warning"] = beyond
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
    if ranks is not None:
        ranks.allocate(engine.pool_tokens // settings.page_size, engine.context_length)
    if serving:
        engine.prepare(on_progress)
        engine.when_idle(engine.claim_scratch())
    if samples is not None:
        steps = speed.speed_steps(samples, model.device, settings.strict)
        if serving and not settings.strict:  # strict refuses to serve what is slow: that must be known now
            engine.when_idle(chain(engine.claim_scratch(), steps))
        else:
            for _ in steps:
                pass
    return engine


def _fitting_tokenizer(settings: Settings, header: CheckpointHeader) -> FastTokenizer:
    """The tokenizer; E0251 where it is another model's, which is known before a weight is read."""
    from lowbit.models.registry import family_of
    from lowbit.tokenization import check_vocabulary, load_tokenizer

    rows = family_of(header).config_of(header).vocab_size
    tokenizer = load_tokenizer(header, settings.tokenizer, rows)
    check_vocabulary(tokenizer, rows)
    if tokenizer.source.left_out:
        named = ", ".join(printable(repr(text)) for text in tokenizer.source.left_out)
        _log.info("lowbit: plain text, as the embedding has no row for it: %s", named)
    return tokenizer


def _beyond_context(settings: Settings, header: CheckpointHeader) -> str:
    """What to say of a --context-length that is more than the model's own; E0103 where it cannot be."""
    from lowbit.models.registry import family_of

    config, wanted = family_of(header).config_of(header), settings.context_length or 0
    if wanted <= config.context_length:
        return ""
    own = thousands(config.context_length)
    beyond = f"--context-length {thousands(wanted)} is more than the model's own {own}"
    if config.learned_positions:
        raise LowbitError("E0103", f"{beyond}, and it has no vectors for later positions; lower it")
    if settings.strict:
        raise LowbitError("E0103", f"{beyond}; lower it, or drop --strict")
    if config.rope_scaling.kind == "dynamic":
        return f"{beyond}: it computes all positions as dynamic NTK does those of the longest sequence"
    return f"{beyond}: behind that it talks nonsense unless trained for it"


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


def _stopped_by(other: Future[FastTokenizer], ranks: Ranks | None, report: Progress | None) -> Progress:
    """``report``, which also ends loading as soon as what runs beside it has failed."""

    def progress(done: int, total: int, what: str) -> None:
        if other.done():
            other.result()
        if ranks is not None:
            ranks.check()
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
