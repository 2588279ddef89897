"""The answer to "is this quantization faster here than bf16?": a line for each kind of layer, and a
warning, or under ``--strict`` a refusal, where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from lowbit.checkpoint.embedded import cache_directory
from lowbit.errors import LowbitError
from lowbit.kernels.timing import (
    Slower,
    TimingTable,
    known_timings,
    machine,
    measurements,
    slower_than_bf16,
)
from lowbit.loading.samples import Samples

_log = logging.getLogger("lowbit")

FILE = "kernel-timings.json"


def wanted(setting: str, serving: bool) -> bool:
    """Whether ``--kernel-timings`` asks for it: auto is for servers, whose log somebody reads."""
    return setting == "on" or (setting == "auto" and serving)


def say_speed(samples: Samples, device: torch.device, strict: bool) -> None:
    """Time what the table on disk does not know yet, and say how fast each kind of layer is."""
    for _ in speed_steps(samples, device, strict):
        pass


def speed_steps(samples: Samples, device: torch.device, strict: bool) -> Iterator[None]:
    """``say_speed`` that stops before each measurement, of about a tenth of a second; where the table knows
    all kinds, the first ``next`` says it all."""
    table = TimingTable(cache_directory() / FILE, machine(device, _version()))
    yield from measurements(samples.counts, table, device)
    timings = known_timings(samples.counts, table)
    try:
        table.save()
    except OSError as error:
        _log.info("lowbit: kernel timings are not kept: %s", error.strerror or error)
    for timing in timings:
        _log.info("lowbit: %s", timing)
    if left := len(samples.counts) - len(timings):
        _log.info("lowbit: %d more kinds of layers are timed at the next start", left)
    for slower in slower_than_bf16(timings):
        text = f"{slower}; {_instead(slower)}"
        if strict:
            raise LowbitError("E0413", f"{text}, or drop --strict")
        _log.warning("lowbit: %s", text)


def _instead(slower: Slower) -> str:
    if slower.kernel == "reference":
        return (
            "no fast kernel takes it here (lowbit inspect says why), the reference kernel needs "
            f"{1 / slower.ratio:.1f} times as long; use the unquantized model with --quantization int8"
        )
    return "use the unquantized model, as it is or with another --quantization (int8, int4)"


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lowbit")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
