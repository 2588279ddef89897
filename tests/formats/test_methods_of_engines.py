"""Every method that another engine lists is read, or refused by name with what to do.

The lists are vLLM's QUANTIZATION_METHODS (of 0.5 to this year's), SGLang's, Aphrodite's, TGI's and
LMDeploy's, and GPTQModel's table of methods and formats.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from formats.helpers import reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import all_formats
from lowbit.formats.refused import REFUSED

VLLM = """
aqlm auto-round auto_awq auto_gptq awq awq_marlin bitblas bitsandbytes compressed-tensors cpu_awq
cpu_gptq deepgemm_fp8 deepseek_v4_fp8 deepspeedfp experts_int8 fbgemm_fp8 fp8 fp8_per_block
fp8_per_channel fp8_per_tensor fp_quant gguf gpt_oss_mxfp4 gptq gptq_bitblas gptq_marlin
gptq_marlin_24 hqq humming inc int8_per_channel_weight_only ipex marlin modelopt modelopt_fp4
modelopt_mixed modelopt_mxfp8 moe_wna16 mxfp4 mxfp8 neuron_quant nvfp4_per_token online petit_nvfp4
ptpc_fp8 qqq quark rtn squeezellm torchao tpu_int8
"""
SGLANG = """
auto-round auto-round-int8 awq awq_marlin bitsandbytes blockwise_int8 compressed-tensors fbgemm_fp8
fp8 gguf gptq gptq_marlin humming marlin mlx_q4 mlx_q8 modelopt modelopt_fp4 modelopt_fp8
modelopt_mixed modelslim moe_wna16 mxfp4 mxfp8 mxfp_w4a8 nvfp4_online petit_nvfp4 qoq quark
quark_int4fp8_moe quark_mxfp4 unquant w4afp8 w8a8_fp8 w8a8_int8
"""
OTHERS = """
quant_llm smooth_quant turbomind bitsandbytes-nf4 bitsandbytes-fp4 eetq exl2 exl3 higgs paroquant
quanto quip sinq spqr vptq bitnet metal fouroversix
"""  # Aphrodite, LMDeploy, TGI, transformers
NAMES = sorted({*VLLM.split(), *SGLANG.split(), *OTHERS.split()})
# GPTQModel's METHOD and FORMAT: what its checkpoints say.
GPTQMODEL = {
    "gptq": ("gptq", "gptq_v2", "gptq_p", "marlin", "marlin_24", "bitblas"),
    "awq": ("gemm", "gemv", "gemv_fast", "marlin", "bitblas", "llm-awq"),
    "fp8": ("float8_e4m3fn", "float8_e5m2"),
    "bitsandbytes": ("nf4", "fp4", "int8"),
    "exl3": ("exl3",),
    "gguf": ("q_0", "q_k_m"),
    "qqq": ("qqq",),
    "paroquant": ("paroquant",),
}
PAIRS = [(method, written) for method, formats in GPTQMODEL.items() for written in formats]


def said(folder: Path, config: dict[str, object]) -> LowbitError | None:
    """What opening says of a plain model with this config; None where it opens."""
    weight = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    try:
        reader_of(write_folder(folder, weight, config))
    except LowbitError as error:
        return error
    return None


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_known(name: str, tmp_path: Path) -> None:
    """A format's own complaint about a plain model, or the name in the table of those refused."""
    error = said(tmp_path / "m", {"quant_method": name})
    if error is None or error.code in ("E0212", "E0213"):
        return
    assert error.code == "E0211" and "is unknown" not in str(error)
    assert f"quantization method {name} (" in str(error) and REFUSED[name] in str(error)


@pytest.mark.parametrize(("method", "written"), PAIRS, ids=[f"{pair[0]}-{pair[1]}" for pair in PAIRS])
def test_gptqmodels_pairs(method: str, written: str, tmp_path: Path) -> None:
    """Opened as far as a plain model goes, or refused by the name of the format."""
    bits = 8 if method in ("fp8",) or written in ("int8", "q_0") else 4
    config: dict[str, object] = {
        "quant_method": method,
        "method": method,
        "format": written,
        "checkpoint_format": written,
        "bits": bits,
        "group_size": 128,
        "krot": 8,
    }
    error = said(tmp_path / "m", config)
    if written == "bitblas":
        assert error is not None and error.code in ("E0211", "E0218") and written in str(error)
    else:
        assert error is None or error.code == "E0213", error


def test_advice_says_what_to_do() -> None:
    known = {name for fmt in all_formats() for name in (fmt.name, *fmt.aliases)}
    for name, advice in REFUSED.items():
        assert re.search(r"\buse\b|\bremove\b|config\.json should say", advice), name
        should = re.search(r"config\.json should say quant_method ([\w-]+)$", advice)
        assert should is None or should[1] in known, name
