"""Online methods on the whole embedded model: no further from the float original than the tools' own weights.

The original is dithered off the file's 4-bit grid (benchmarks/quality_originals.py). Both sides quantize it:
lowbit as it is loaded, and the real tool each matrix that lowbit quantized, with inputs as the tool rounds
them; the tool's model then runs in float32 in transformers. Both are compared with the original in float32 in
transformers, over English text. lowbit's own bfloat16 products and cache have to fit into the allowance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmark_modules import benchmark_module
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import load_model, plan_model
from lowbit.loading.planner import ModulePlan
from quantize.test_tools import need
from quantize.tools import ACTIVATIONS, TOOLS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

originals = benchmark_module("quality_originals")

POSITIONS = 960
ALLOWED_RATIO, ALLOWED_NATS = 1.05, 0.0005
BLOCK = 128  # of transformers' fine-grained fp8

Weights = Callable[[Tensor, ModulePlan], Tensor]
Inputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """``weights``: the tool's float32 weight from the bf16 one; ``inputs``: its rule for x (tokens, in)."""

    method: str
    tool: str
    weights: Weights
    inputs: Inputs | None = None


def of_tool(tool: str, name: str, inputs: Inputs | None = None) -> Case:
    """A case of tools.py."""
    case = TOOLS[tool][name]
    return Case(case.method, tool, lambda weight, _: case.make(weight)["expected"], inputs)


def torchao_inputs(name: str) -> Inputs:
    """As its dynamic configurations round them, from bf16."""
    return lambda x: ACTIVATIONS[name].make(x.bfloat16())["expected"]


def transformers_weight(weight: Tensor, _: ModulePlan) -> Tensor:
    """Codes times the scale of their 128 x 128 block."""
    made = TOOLS["transformers"]["fp8_block"].make(weight)
    rows, columns = weight.shape
    scale = made["scale"].float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return made["codes"].view(torch.float8_e4m3fn).float() * scale[:rows, :columns]


def transformers_inputs(x: Tensor) -> Tensor:
    """Its activation kernel's rule, which needs a GPU to run: e4m3 under max / 448 of 128 columns."""
    tokens, columns = x.shape
    groups = torch.nn.functional.pad(x, (0, -columns % BLOCK)).view(tokens, -1, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view(tokens, -1)[:, :columns]


def llm_int8_inputs(x: Tensor) -> Tensor:
    """bitsandbytes: columns of a prompt with a number from 6 stay float16, the others are int8."""
    from bitsandbytes import functional

    half = x.half()
    codes, scales, columns = functional.int8_vectorwise_quant(half.clone(), threshold=6.0)
    made = codes.float() * scales[:, None].float() / 127
    made[:, columns.long()] = half[:, columns.long()].float()
    return made


def gguf_weight(weight: Tensor, module: ModulePlan) -> Tensor:
    """The gguf package's own quantizer, of the type the module has."""
    import gguf

    kind = gguf.GGMLQuantizationType[module.scheme.weight.name.removeprefix("gguf_").upper()]
    packed = gguf.quants.quantize(weight.float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


CASES = {
    **{f"gguf {name}": Case(f"gguf:type={name},pure=true", "gguf", gguf_weight)
       for name in ("q4_0", "q4_1", "q5_0", "q8_0")},
    "transformers fp8": Case("fp8:weights=block", "transformers", transformers_weight, transformers_inputs),
    **{f"torchao {name}": of_tool("torchao", name, torchao_inputs(name) if name in ACTIVATIONS else None)
       for name in ("int8dq", "int8wo", "fp8wo", "fp8dq-per_tensor", "fp8dq-per_row",
                    "int4wo-32", "int4wo-64", "int4wo-128", "int4wo-256")},
    **{f"bitsandbytes {name}": of_tool("bitsandbytes", name) for name in ("nf4", "nf4_double", "fp4")},
    "bitsandbytes int8": of_tool("bitsandbytes", "int8", llm_int8_inputs),
    **{f"hqq {bits}": of_tool("hqq", f"hqq_{bits}") for bits in (8, 4, 3)},
    **{f"compressed-tensors {name}": of_tool("compressed_tensors", name)
       for name in ("mxfp8", "mxfp4", "int4_g32", "int4_g32_asym", "int8_g64_asym")},
    "modelopt nvfp4": of_tool("modelopt", "nvfp4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dithered original."""
    out = tmp_path_factory.mktemp("quality") / "dithered"
    originals.write_dithered(open_checkpoint(originals.SOURCE), out)
    return out


@dataclass
class Reference:
    """transformers with the original in float32, and what it says of every position."""

    model: PreTrainedModel
    weights: dict[str, Tensor]  # bf16, of the matrices
    prompts: list[list[int]]
    log_probabilities: list[Tensor]

    def logits(self) -> Iterator[Tensor]:
        """Of the model as it is now, prompt by prompt."""
        for prompt in self.prompts:
            with torch.no_grad():
                yield self.model(torch.tensor([prompt])).logits[0]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = {
        name: module.weight.detach().bfloat16()
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    made = Reference(model, weights, originals.english_prompts(POSITIONS), [])
    made.log_probabilities = [torch.log_softmax(logits, -1) for logits in made.logits()]
    return made


@contextmanager
def as_the_tool_has_it(reference: Reference, quantized: list[ModulePlan], case: Case) -> Iterator[None]:
    """While it lasts, the reference's matrices are the tool's, and their inputs pass through its rule."""

    def rounded(layer: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert case.inputs is not None
        (x,) = arguments  # (1, tokens, in)
        return (case.inputs(x[0]).float()[None],)

    layers = {module.name: reference.model.get_submodule(module.name) for module in quantized}
    hooks = []
    try:
        for module in quantized:
            layer, weight = layers[module.name], case.weights(reference.weights[module.name], module)
            assert weight.shape == layer.weight.shape and weight.isfinite().all(), module.name
            layer.weight.data.copy_(weight)
            if case.inputs is not None:
                hooks.append(layer.register_forward_pre_hook(rounded))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.weight.data.copy_(reference.weights[name])


@pytest.mark.parametrize("name", CASES)
def test_kl_is_not_above_the_tools(name: str, folder: Path, reference: Reference) -> None:
    case = CASES[name]
    if case.tool == "gguf":
        pytest.importorskip("gguf")
    else:
        need(case.tool)
    header = open_checkpoint(str(folder))
    modules = plan_model(header, device="cpu", quantization=case.method).modules
    quantized = [module for module in modules if not module.scheme.is_dense]
    assert len(quantized) >= 30, "the case tests nothing"

    def divergence(logits: Iterator[Tensor]) -> tuple[float, float]:
        found = [
            originals.compare(expected, answer)
            for expected, answer in zip(reference.log_probabilities, logits, strict=True)
        ]
        made = originals.Divergence.of([kl for kl, _ in found], [same for _, same in found])
        return made.mean_kl, made.top1_agreement

    model = load_model(header, device="cpu", quantization=case.method)
    ours, our_first = divergence(originals.prompt_logits(model, prompt) for prompt in reference.prompts)
    with as_the_tool_has_it(reference, quantized, case):
        tools, their_first = divergence(reference.logits())
    print(
        f"\n{name}: lowbit {ours:.5f} ({our_first:.1%}), tool {tools:.5f} ({their_first:.1%}), "
        f"{len(quantized)} modules",
        flush=True,
    )
    assert tools > 0
    assert ours <= max(ALLOWED_RATIO * tools, tools + ALLOWED_NATS)
