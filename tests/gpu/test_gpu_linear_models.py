"""Whole models whose linear layers all run on kernels in Triton, beside the CPU's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forward_helpers import prompt_logits
from gguf_writing import GgufTensor, write_gguf
from kernel_inputs import ROUNDS_INPUTS
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.kernels.gpu import runtime
from lowbit.loading import load_model

pytest.importorskip("gguf")

from models.test_gguf_families import HIDDEN, LLAMA, MATRICES, NORMS, moderate_blocks

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library was not built"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="one device for both: the interpreter's"),
]

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENS = [3, 17, 22, 5, 30, 11, 2, 31, 8]


def logits_and_kernels(path: Path) -> tuple[Tensor, frozenset[str]]:
    model = load_model(open_checkpoint(str(path)), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [[token % model.vocab_size for token in TOKENS]])
    return logits, model.kernels


def divergence(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, frozenset[str]]:
    """The largest KL of a position, in nats; and the kernels that ran here."""
    found, kernels = logits_and_kernels(path)
    with monkeypatch.context() as patch:
        patch.setitem(runtime._state, "interpreting", False)
        wanted, others = logits_and_kernels(path)
    assert not [name for name in others if name.startswith("gpu")]
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max()), kernels


@pytest.mark.parametrize("name", ["awq/gemm", "gptq/w4_asym_actorder"])
def test_int4_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kl, kernels = divergence(FIXTURES / name, monkeypatch)
    assert {"gpu_blocks", "gpu_dense"} <= kernels
    assert not kernels & {"reference", "cpu_blocks", "cpu_dense"}
    assert kl < (1e-4 if ROUNDS_INPUTS else 2e-3), "the GPU's x is bfloat16"


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("exl3/mul1", "gpu_trellis"),
        ("exl3/mcg_padded_tied", "gpu_trellis"),
        ("aqlm/2x8_g8", "gpu_vectors"),
        ("aqlm/1x12_g4x2", "gpu_vectors"),
        ("vptq/v6_k64_outliers", "gpu_row_vectors"),
        ("quip_sharp/e8p12", "gpu_lattice"),
        ("spqr/ptcsr_act_order", "gpu_halves"),
        ("hqq/4_g16_axis0", "gpu_columns"),
        ("sinq/4_tiles", "gpu_columns"),
    ],
)
def test_codes_stay_packed(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kl, kernels = divergence(FIXTURES / name, monkeypatch)
    assert kernel in kernels and all(one.startswith("gpu") for one in kernels)
    assert kl < 1e-4


def test_a_gguf_of_k_quants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("q6_k", "q4_k", "q3_k", "q4_k", "q5_k", "q4_k", "iq4_xs", "q4_k", "q2_k")
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for stored in NORMS:
        values = (torch.rand(MATRICES["output"][2], generator=generator) + 0.5).numpy()
        tensors.append(GgufTensor(f"{stored}.weight", "F32", values.shape, values.tobytes()))
    for kind, (stored, (_, *size)) in zip(kinds, MATRICES.items(), strict=True):
        rows, columns = (min(number, HIDDEN) for number in size)  # a narrow MLP: the interpreter is slow
        raw, values = moderate_blocks(kind, rows, columns)
        assert np.isfinite(values).all()
        tensors.append(GgufTensor(f"{stored}.weight", kind.upper(), (rows, columns), raw.tobytes()))
    write_gguf(tmp_path / "m.gguf", LLAMA | {"llama.feed_forward_length": HIDDEN}, tensors)
    kl, kernels = divergence(tmp_path / "m.gguf", monkeypatch)
    assert "gpu_blocks" in kernels and not kernels & {"reference", "cpu_blocks", "cpu_dense"}
    assert kl < 1e-4
