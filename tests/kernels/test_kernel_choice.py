"""Which kernel runs a weight: the order, timings put in by hand, and a name of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import CPU, canonical, dense_weight, needs_native
from lowbit.errors import LowbitError
from lowbit.kernels import Choice
from lowbit.kernels.kernel_choice import Entry, chosen, named
from lowbit.kernels.timing import Seconds, key_of
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme

pytestmark = needs_native

SHAPE = (64, 1024)
MXFP4 = canonical("e2m1", 32, "e8m0").scheme  # 4.25 bits a weight; its bf16 copy is exact
E5M2 = canonical("e5m2", 4, "e8m0").scheme  # no packed layout
NF4 = canonical("nf4", 64, "f32").scheme
SLOW, FAST = 8.0, 1.0


def table(entries: Mapping[tuple[str, Scheme], dict[int, tuple[float, float]]]) -> Entry:
    """Timings by kernel and scheme: tokens -> (the kind, our bf16)."""
    known = {
        key_of(kernel, str(scheme), SHAPE): {n: Seconds(*pair) for n, pair in seconds.items()}
        for (kernel, scheme), seconds in entries.items()
    }
    return known.get


def of(scheme: Scheme, entry: Entry) -> Choice:
    return chosen(scheme, SHAPE, CPU, entry)


def reasons(choice: Choice) -> dict[str, str]:
    return {loser.kernel: loser.reason for loser in choice.losers}


def test_the_order_decides_where_nothing_was_timed() -> None:
    for scheme, kernel in ((MXFP4, "cpu_blocks"), (E5M2, "reference"), (NF4, "cpu_blocks")):
        choice = of(scheme, table({}))
        assert (choice.kernel.name, choice.by) == (kernel, "")
        assert choice.contested is (scheme is not NF4), "a copy of nf4 is rounded"
    plain = chosen(dense_weight("bf16", SHAPE).scheme, SHAPE, CPU)
    assert plain.kernel.name == "cpu_dense" and not plain.contested
    assert reasons(of(NF4, table({}))) == {
        "reference": "unpacks at every call, and a row's last bit may depend on others",
        "cpu_dequantized": "rounds the weights to bfloat16, 3.6x the memory",
    }


def test_time_and_memory_decide_between_kernels_that_keep_the_numbers() -> None:
    # The copy takes 16 bits where the packed weight takes 4.5 (e8m0 scales in 16): 3.6 times the memory.
    def blocks(ratio: float) -> Entry:
        return table({("cpu_blocks", MXFP4): {n: (n * ratio, n * 1.0) for n in (1, 32, 256)}})

    assert of(MXFP4, blocks(3.5)).kernel.name == "cpu_blocks"
    choice = of(MXFP4, blocks(4.5))
    assert (choice.kernel.name, choice.by) == ("cpu_dequantized", "by timing")
    assert reasons(choice)["cpu_blocks"] == "0.22x as fast with 1 token, 0.22x with 32, 0.22x with 256"
    lost = reasons(of(MXFP4, blocks(3.5)))
    assert (
        lost["cpu_dequantized"] == "3.5x as fast with 1 token, 3.5x with 32, 3.5x with 256, 3.6x the memory"
    )
    assert of(MXFP4, blocks(3.8)).kernel.name == "cpu_blocks", "within what neighbours may do"


def test_a_request_weighs_the_numbers_of_tokens() -> None:
    """128 calls of one token, 4 of 32, 4 of 256."""
    alone = {1: (5.0, 1.0), 32: (1.0, 1.0), 256: (1.0, 1.0)}
    assert of(MXFP4, table({("cpu_blocks", MXFP4): alone})).kernel.name == "cpu_dequantized"
    prefill = {1: (1.0, 1.0), 32: (5.0, 1.0), 256: (5.0, 1.0)}
    assert of(MXFP4, table({("cpu_blocks", MXFP4): prefill})).kernel.name == "cpu_blocks"
    huge = {1: (1.0, 1.0), 32: (5.0, 1.0), 256: (400.0, 40.0)}  # 4 x 400 weigh more than 128
    assert of(MXFP4, table({("cpu_blocks", MXFP4): huge})).kernel.name == "cpu_dequantized"


def test_what_rounds_is_never_chosen_by_timing() -> None:
    slow = dict.fromkeys((1, 32, 256), (100.0, 1.0))
    choice = of(NF4, table({("cpu_blocks", NF4): slow}))
    assert choice.kernel.name == "cpu_blocks"
    assert reasons(choice)["cpu_dequantized"].startswith("rounds the weights to bfloat16, 100.0x as fast")


def test_the_reference_never_beats_a_steady_kernel() -> None:
    entries = {("cpu_blocks", NF4): {1: (SLOW, SLOW)}, ("reference", NF4): {1: (FAST, SLOW)}}
    assert of(NF4, table(entries)).kernel.name == "cpu_blocks"


def test_a_copy_beats_the_reference_where_it_is_faster_by_more_than_it_is_larger() -> None:
    assert of(E5M2, table({("reference", E5M2): {1: (9.0, 1.0)}})).kernel.name == "cpu_dequantized"
    assert of(E5M2, table({("reference", E5M2): {1: (1.5, 1.0)}})).kernel.name == "reference"
    own = {("reference", E5M2): {1: (9.0, 1.0)}, ("cpu_dequantized", E5M2): {1: (8.0, 1.0)}}
    assert of(E5M2, table(own)).kernel.name == "reference", "what was timed itself counts first"


def test_one_number_of_tokens_is_doubtful() -> None:
    """10 bits a weight against 16: 1.6 times the memory."""
    for seconds, kernel in (
        ({1: (3.0, 1.0)}, "reference"),
        ({1: (3.0, 1.0), 32: (3.0, 1.0)}, "cpu_dequantized"),
        ({1: (4.0, 1.0)}, "cpu_dequantized"),
    ):
        assert of(E5M2, table({("reference", E5M2): seconds})).kernel.name == kernel


def test_quantized_inputs_leave_it_to_the_order() -> None:
    inputs = replace(MXFP4, activation=ActivationScheme(number_format("e4m3"), (1, 32)))
    choice = of(inputs, table({("cpu_blocks", inputs): {1: (100.0, 1.0)}}))
    assert choice.kernel.name == "cpu_blocks" and not choice.contested


def test_a_name_wins_over_timings() -> None:
    fast = table({("cpu_blocks", NF4): {1: (1.0, 10.0)}})
    choice = named(NF4, SHAPE, CPU, "cpu_dequantized", fast)
    assert isinstance(choice, Choice) and choice.kernel.name == "cpu_dequantized"
    assert choice.by == "by --linear-kernel"
    assert reasons(choice)["cpu_blocks"] == "10.0x as fast with 1 token"
    assert named(E5M2, SHAPE, CPU, "cpu_blocks") == "needs groups of a multiple of 8 columns, got 4"
    assert named(NF4, SHAPE, torch.device("cuda"), "cpu_dequantized") == "runs on a CPU, the device is cuda"
    known = "known: auto, gpu_blocks, gpu_columns, gpu_halves"
    with pytest.raises(LowbitError, match=f"no kernel 'marlin'; {known}") as caught:
        named(NF4, SHAPE, CPU, "marlin")
    assert caught.value.code == "E0103"
