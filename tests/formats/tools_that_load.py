"""Which tool, of which version, loaded what lowbit wrote: for docs/formats.md. Each row is a test.

The versions are those the tests last ran with; they skip where a tool is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats.gptq_writer import GptqWriter
from lowbit.formats.writing import all_writers
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme


@dataclass(frozen=True)
class Loaded:
    """``form``: as written; ``how``: what the tool took and gave; ``test``: file under tests, and name."""

    form: str
    tool: str
    how: str
    test: str


_WRITTEN = "formats/test_written_in_tools.py::"
_OWN_LOGITS = "the folder; the logits it has for its own file"
_PLAIN_LOGITS = "the folder; the plain model's logits"
_EXACT = "the folder or file; exact weights"
_TENSORS = "the tensors; its layers hold the exact weights"
LOADED = (
    Loaded("awq", "autoawq 0.2.9", _TENSORS, f"{_WRITTEN}test_awq_in_autoawq"),
    Loaded("awq", "gptqmodel 7.6.0", _EXACT, f"{_WRITTEN}test_gptq_and_awq_in_gptqmodel"),
    Loaded("awq", "transformers 5.23.0, gptqmodel 7.6.0", _OWN_LOGITS, f"{_WRITTEN}test_logits"),
    Loaded("bitsandbytes", "transformers 5.23.0, bitsandbytes 0.50.2", _OWN_LOGITS, f"{_WRITTEN}test_logits"),
    Loaded("blockwise_int8", "sglang 0.5.23", _TENSORS, f"{_WRITTEN}test_w8a8_in_sglang"),
    Loaded(
        "compressed-tensors",
        "transformers 5.23.0, compressed-tensors 0.20.0",
        _OWN_LOGITS,
        f"{_WRITTEN}test_logits",
    ),
    Loaded(
        "compressed-tensors",
        "transformers 5.23.0, compressed-tensors 0.20.0",
        "the folder made of w8a8_int8; logits near the plain model's",
        f"{_WRITTEN}test_int8_with_inputs_in_compressed_tensors",
    ),
    Loaded(
        "dense",
        "transformers 5.23.0",
        "the folder; lowbit's greedy tokens",
        "loading/test_convert_dense.py::test_embedded_model_in_transformers",
    ),
    Loaded("fp8", "transformers 5.23.0", _OWN_LOGITS, f"{_WRITTEN}test_fp8_in_transformers"),
    Loaded(
        "gguf",
        "transformers 5.23.0, gguf 0.19.0",
        _EXACT,
        f"{_WRITTEN}test_gguf_in_transformers",
    ),
    Loaded("gptq", "gptqmodel 7.6.0", _EXACT, f"{_WRITTEN}test_gptq_and_awq_in_gptqmodel"),
    Loaded(
        "gptq",
        "transformers 5.23.0, optimum 2.3.0, gptqmodel 7.6.0",
        _OWN_LOGITS,
        f"{_WRITTEN}test_logits",
    ),
    Loaded("hqq", "hqq 0.2.8.post1", _TENSORS, "formats/test_hqq.py::test_the_tool_loads_them"),
    Loaded(
        "hqq",
        "transformers 4.57.6, hqq 0.2.8.post1",
        _PLAIN_LOGITS,
        f"{_WRITTEN}test_hqq_in_transformers_4",
    ),
    Loaded("mlx", "mlx-lm 0.32.2, mlx 0.32.4", _OWN_LOGITS, f"{_WRITTEN}test_mlx"),
    Loaded(
        "modelopt",
        "nvidia-modelopt 0.47.0",
        "the tensors; its dequantizers give the exact weights (it loads no exported folder)",
        f"{_WRITTEN}test_modelopt_s_own_tensors",
    ),
    Loaded("mxfp4", "transformers 5.23.0", _OWN_LOGITS, f"{_WRITTEN}test_mxfp4_in_transformers"),
    Loaded(
        "torchao",
        "transformers 5.23.0, torchao 0.18.0",
        _EXACT,
        "formats/test_torchao.py::test_the_tool_loads_them",
    ),
    Loaded("w8a8_fp8", "sglang 0.5.23", _TENSORS, f"{_WRITTEN}test_w8a8_in_sglang"),
    Loaded("w8a8_int8", "sglang 0.5.23", _TENSORS, f"{_WRITTEN}test_w8a8_in_sglang"),
)


def warnings() -> dict[str, str]:
    """What is said when a format is written, of tools that misread it."""
    found = {name: writer.misread for name, writer in all_writers().items() if writer.misread}
    four = Scheme(number_format("int4"), ((1, 32),), (number_format("f16"),))
    eight = Scheme(number_format("int8"), ((1, 32),), (number_format("f16"),))
    mixed = {"a": four, "b": eight, "lm_head": four}
    found["gptq"] = GptqWriter(mixed).warning()
    return found


def loaded() -> list[str]:
    """Markdown."""
    lines = [
        "## Which tools load what is written",
        "",
        "Of each format the tools that loaded what lowbit wrote, and the test that has them do it "
        "(under tests; they skip where the tool is not installed). Other tools may load it as well.",
        "",
        "| format | tool | what it loaded | test |",
        "| --- | --- | --- | --- |",
    ]
    for row in LOADED:
        lines.append(f"| `{row.form}` | {row.tool} | {row.how} | `{row.test}` |")
    lines += [
        "",
        "**Misread without an error.** A tool that opens such a folder and computes with other numbers; "
        "`lowbit convert` and `--save-quantized` say it when they write one, and "
        "`test_what_transformers_misreads_is_said` finds out which formats transformers 5.23 does it to. "
        'Of a method it does not know it logs "Unknown quantization type" and skips the quantization '
        "(quantizers/auto.py, `supports_quant_method`); HQQ it knows, but nothing there makes HQQLinears of "
        "W_q and scales (quantizers/quantizer_hqq.py has no `get_load_operations`): its load report has them "
        "as UNEXPECTED and the weights as MISSING, newly initialized. Its GPTQ has one rule for all "
        "Linears that it converts: those of the blocks, or the kinds in `modules_in_block_to_quantize`, "
        "which is written where whole kinds are plain.",
        "",
        "| format | what is said |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {text} |" for name, text in sorted(warnings().items())]
    return lines
