"""The answer to "is this quantization faster here than bf16?": a line for each kind of layer, and a
warning, or under ``--strict`` a refusal, where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.timing import (
    COPY,
    Slower,
    known_timings,
    measurements,
    slower_than_bf16,
    times,
    with_tokens,
)
from lowbit.loading import load_model, model_options
from lowbit.loading.kernel_choice import Timings, keep, timing_table
from lowbit.loading.samples import Samples
from lowbit.quantize.recipe import Asked
from lowbit.settings import Settings

_log = logging.getLogger("lowbit")


def wanted(setting: str, serving: bool) -> bool:
    """Whether ``--kernel-timings`` asks for it: auto is for servers, whose log somebody reads."""
    return setting == "on" or (setting == "auto" and serving)


def timings_for(setting: str, serving: bool) -> Timings:
    """What timings are to a model that is loaded: missing ones are taken where they would be anyway."""
    return "unused" if setting == "off" else "measured" if wanted(setting, serving) else "kept"


def time_model(header: CheckpointHeader, settings: Settings) -> None:
    """Load a model, and time the kinds of its layers that are not known yet, as serving it would."""
    if settings.threads is not None:
        native.set_threads(settings.threads)
        torch.set_num_threads(settings.threads)
    samples = Samples()
    model = load_model(
        header,
        **model_options(settings),
        quantization=Asked.by(settings),
        samples=samples,
        timings="measured",
    )
    say_speed(samples, model.device, strict=False)


def say_speed(samples: Samples, device: torch.device, strict: bool) -> None:
    """Time what the table on disk does not know yet, and say how fast each kind of layer is."""
    for _ in speed_steps(samples, device, strict):
        pass


def speed_steps(samples: Samples, device: torch.device, strict: bool) -> Iterator[None]:
    """``say_speed`` that stops before each measurement, of about a tenth of a second; where the table knows
    all kinds, the first ``next`` says it all. Nothing on a GPU, where a sample's time is that of launching it
    from Python: there benchmarks/linear.py times whole layers."""
    if device.type != "cpu":
        return
    table = timing_table(device)
    yield from measurements(samples.counts, table, device)
    timings = known_timings(samples.counts, table)
    keep(table)
    for timing in timings:
        _log.info("lowbit: %s", timing)
    if left := len(samples.counts) - len(timings):
        _log.info("lowbit: %d more kinds of layers are timed at the next start", left)
    for slower in slower_than_bf16(timings):
        text = f"{slower}; {_instead(slower)}"
        if strict and not slower.plain:
            raise LowbitError("E0413", f"{text}, or drop --strict")
        _log.warning("lowbit: %s", text)


def _instead(slower: Slower) -> str:
    if slower.plain:
        return "torch's rows depend on the batch they are computed in, so it is not used"
    copy = ""
    if slower.copy is not None:
        copy = (
            f"--linear-kernel {COPY} is {times(slower.copy)} as fast {with_tokens(slower.tokens)}, and "
            "holds these weights in bfloat16 (lowbit inspect says in how much more memory); or "
        )
    if slower.kernel == "reference":
        return (
            "no fast kernel takes it here (lowbit inspect says why), the reference kernel needs "
            f"{1 / slower.ratio:.1f} times as long; {copy}use the unquantized model with --quantization int8"
        )
    return f"{copy}use the unquantized model, as it is or with another --quantization (int8, int4)"
