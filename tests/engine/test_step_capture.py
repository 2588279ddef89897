"""Captured steps against eager ones: equal bits of logits, states and tokens, whatever comes and goes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from checkpoint import tiny
from contract.test_linear_kernels import trellis
from engine.stand_in import ByteTokenizer
from formats.hqq_columns import columns_llama
from forward_helpers import PAGE, allocate, chunk_batch
from loading.test_online import make as make_float
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.engine.step_capture import StepCapture
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.cpu_trellis import CpuTrellis
from lowbit.kernels.experts import GroupedExperts
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.packed_linear import NativeWeight
from lowbit.kernels.recurrent import state_bytes
from lowbit.kernels.reference import Reference
from lowbit.layers.mlp import MixtureOfExperts
from lowbit.loading import load_model
from lowbit.models.decoder import Decoder
from lowbit.models.deepseek import LatentAttention
from lowbit.models.mixer_model import MixerModel
from lowbit.models.model import Model
from lowbit.numerics.llm_int8 import llm_int8_inputs
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay
from lowbit.quantize.recipe import Asked
from lowbit.quantize.specification import TORCHAO
from lowbit.settings import Settings
from models.family_cases import SIZES, saved, write_checkpoint
from models.test_deepseek import make_checkpoint as make_latent
from models.test_families import make_checkpoint
from models.test_llama_relatives import RENAMED, llama
from models.test_plain_mlp_families import CASES as PLAIN_MLP

FIXTURES = Path(__file__).parents[1] / "fixtures"
INT8, E4M3, E2M1, E8M0 = (number_format(name) for name in ("int8", "e4m3", "e2m1", "e8m0"))
DELAYED = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=Delay(4, 1))
SCHEMES = {
    "plain": None,
    "int8 per token": ActivationScheme(INT8, (1, 0), limit=127.0),
    "int8 with a zero point": ActivationScheme(INT8, (1, 0), symmetric=False),
    "fp8 per token": ActivationScheme(E4M3, (1, 0), limit=448.0),
    "fp8 per tensor": ActivationScheme(E4M3, (0, 0), limit=448.0),
    "llm.int8": llm_int8_inputs(1.5),
    "fp8 in groups": ActivationScheme(E4M3, (1, 32), limit=448.0),
    "mxfp4": ActivationScheme(E2M1, (1, 32), scale=E8M0),
    "delayed": DELAYED,
}


@pytest.fixture(autouse=True)
def as_the_engine_runs() -> Iterator[None]:
    """torch alone, as beside native kernels."""
    if native.library() is None:
        pytest.skip("no native library: nothing is captured")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_llama(folder: Path, **config: object) -> Decoder:
    """A random Llama of two heads in bfloat16."""
    tiny.write_folder(folder)
    path = folder / "config.json"
    for name, value in config.items():
        path.write_text(
            path.read_text().replace("{", f'{{"{name}": {value}, ', 1).replace(f'"{name}": 128,', "")
        )
    model = load_model(open_checkpoint(str(folder)), device="cpu", dtype="bfloat16")
    assert isinstance(model, Decoder)
    return model


def quantize_inputs(model: Decoder, scheme: ActivationScheme | None) -> Decoder:
    """Ask every layer of the blocks for it."""
    if scheme is None:
        return model
    for block in model.blocks:
        for linear in (block.qkv, block.output, block.mlp.gate_up, block.mlp.down):  # type: ignore[union-attr]
            state = None if scheme.delay is None else model.states.add(linear.name, scheme, model.device)
            transform = InputTransform(scheme, state=state)
            linear.inputs = [transform] * len(linear.weights)
    return model


Forward = Callable[[ForwardBatch], Tensor]


def decode(
    model: Model,
    through: Callable[[Forward], Forward],
    steps: int = 30,
    longest: int = 40,
    drafts: tuple[int, ...] = (0,),
) -> list[Tensor]:
    """Logits of a prefill and of decode steps of 1 to 6 of the sequences, which come and go.

    ``drafts``: how many tokens may follow a sequence's next one; some of them were right.
    """
    draw = random.Random(8)
    lengths = [1, longest, PAGE - 1, 2 * PAGE, 9, PAGE]
    counts = [-(-(length + steps * (1 + max(drafts))) // PAGE) for length in lengths]
    numbers = list(range(sum(counts)))
    draw.shuffle(numbers)
    pages = [[numbers.pop() for _ in range(count)] for count in counts]
    caches = allocate(model, sum(counts))

    def plain(batch: ForwardBatch) -> Tensor:
        return model.forward(batch, caches)

    forward = through(plain)
    prompts = [[draw.randrange(model.vocab_size) for _ in range(length)] for length in lengths]
    slots = list(range(6)) if state_bytes(model.cache_specs()) else None
    first = [(p, 0, own) for p, own in zip(prompts, pages, strict=True)]
    found = [plain(chunk_batch(first, False, slots))]
    for _ in range(steps):
        chosen = draw.sample(range(6), draw.choice((1, 2, 3, 3, 5, 6)))
        new = [[draw.randrange(model.vocab_size) for _ in range(1 + draw.choice(drafts))] for _ in chosen]
        rows = [(n, lengths[s], pages[s]) for n, s in zip(new, chosen, strict=True)]
        batch = chunk_batch(rows, state_slots=None if slots is None else chosen)
        found.append(forward(batch).clone())
        for tokens, sequence in zip(new, chosen, strict=True):
            lengths[sequence] += draw.randint(1, len(tokens))
    return found


def check(make: Callable[[], Model], **options: Any) -> StepCapture:
    """Eager and captured runs, of a model each where steps leave something in it."""
    eager = make()
    captured = make() if eager.states.state_dict() else eager
    expected = decode(eager, lambda plain: plain, **options)
    captures: list[StepCapture] = []

    def through(plain: Forward) -> Forward:
        captures.append(StepCapture(plain))
        return captures[0].run

    found = decode(captured, through, **options)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), f"step {step}"
        assert torch.isfinite(ours).all()
    for name, tensor in eager.states.state_dict().items():
        assert torch.equal(captured.states.state_dict()[name], tensor), name
    return captures[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_states_are_the_same(scheme: str, tmp_path: Path) -> None:
    capture = check(lambda: quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme]))
    assert not capture.refusal and capture.replayed == 30 - len(capture.sizes)
    if scheme == "delayed":
        model = quantize_inputs(tiny_llama(tmp_path), DELAYED)
        decode(model, lambda plain: StepCapture(plain).run)
        scales = {name: state.scale.item() for name, state in model.states}
        assert len(set(scales.values())) == 4 and 1.0 not in scales.values()


DENSE = [
    *(
        "Qwen2",
        "Qwen3",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Phi3 partial rotary",
        "Mistral",
        "Glm4",
        "Granite",
        "Olmo3",
    ),
    *("StableLm", "StableLm side by side, normed heads", "SmolLM3", "Cohere normed heads", "Cohere2"),
]


@pytest.mark.parametrize("family", DENSE)
def test_every_family_of_the_dense_decoder(family: str, tmp_path: Path) -> None:
    """Biases, norms of all kinds and places, soft caps, windows, scales, blocks side by side, no rotation."""
    make_checkpoint(family, tmp_path)
    capture = check(lambda: load_model(open_checkpoint(str(tmp_path)), device="cpu"))
    assert not capture.refusal and capture.replayed


@pytest.mark.parametrize("name", ["Exaone4", "BitNet", "Starcoder2", "Phi", "Falcon 40B", "GPTNeoX", "GPT2"])
def test_families_of_other_shapes(name: str, tmp_path: Path) -> None:
    """LayerNorms, blocks side by side, MLPs without a gate, learned positions, layers that do not rotate."""
    values = {"Exaone4": SIZES | {"sliding_window": 20}, "BitNet": SIZES, **PLAIN_MLP}[name]
    saved(name.split()[0], tmp_path, **values)
    capture = check(lambda: load_model(open_checkpoint(str(tmp_path)), device="cpu"))
    assert not capture.refusal and capture.replayed


@pytest.mark.parametrize("case", ["MiniCPM", "InternLM 2 with biases", "Baichuan"])
def test_relatives_of_llama(case: str, tmp_path: Path) -> None:
    """Scaled streams and logits; Q, K and V fused in other orders."""
    mapping, values = RENAMED[case]
    write_checkpoint(tmp_path, *mapping(llama(**values)))
    capture = check(lambda: load_model(open_checkpoint(str(tmp_path)), device="cpu"))
    assert not capture.refusal and capture.replayed


def test_a_head_divided_by_its_norms(tmp_path: Path) -> None:
    def make() -> Model:
        model = tiny_llama(tmp_path)
        model.head_scale = torch.linspace(0.5, 2, model.vocab_size)
        return model

    capture = check(make)
    assert not capture.refusal and capture.replayed


@pytest.mark.parametrize(
    "fixture",
    [
        "compressed_tensors/w8a8_dynamic",
        "compressed_tensors/w8a8_static_asym",
        "compressed_tensors/fp8_channel_dynamic",
        "compressed_tensors/w4a16_actorder",
        "compressed_tensors/nvfp4",
        "compressed_tensors/mxfp8",
        "compressed_tensors/two_groups",
        "compressed_tensors/embedding",
        "compressed_tensors/w3a16_asym",
        "fp8/block_128",
        "bitsandbytes/int8",
        "transforms/quip_w4a16",
        "transforms/spinquant_w8a8",
        "quanto/int8_inputs",
        "awq/starcoder2",
        "quip_sharp/e8p12",
        "quip_sharp/e8p12_rvq4",
    ],
)
def test_checkpoints_of_many_formats(fixture: str) -> None:
    """Act-order, row scales, static scales, parts that do not fuse; a layer on the reference is refused."""

    def make() -> Model:
        return load_model(open_checkpoint(str(FIXTURES / fixture)), device="cpu")

    capture = check(make)
    if "reference" in make().kernels:
        assert "in model.layers.0.self_attn.qkv_proj (" in capture.refusal and not capture.replayed
    else:
        assert not capture.refusal and capture.replayed


@pytest.mark.parametrize("size", [16, 32])
def test_scales_of_columns(size: int, tmp_path: Path) -> None:
    """HQQ's axis 0, with biases: Q, K and V one weight, or three."""
    folder, _ = columns_llama(tmp_path, size)
    capture = check(lambda: load_model(open_checkpoint(str(folder)), device="cpu"))
    assert not capture.refusal and capture.replayed


def test_an_fp8_cache_with_scales(tmp_path: Path) -> None:
    def make() -> Model:
        model = tiny_llama(tmp_path)
        model.cache_dtype = torch.float8_e4m3fn
        model.blocks = [replace(block, k_scale=0.37, v_scale=1.9) for block in model.blocks]
        return model

    capture = check(make)
    assert not capture.refusal and capture.replayed


def test_the_page_table_grows(tmp_path: Path) -> None:
    """Past 64 pages of 16 tokens everything is recorded anew, once for each size."""
    capture = check(lambda: tiny_llama(tmp_path, max_position_embeddings=2048), longest=1010)
    assert not capture.refusal and 0 < capture.replayed < 30 - len(capture.sizes)


@pytest.mark.parametrize("scheme", ["plain", "fp8 per token"])
def test_steps_with_drafts(scheme: str, tmp_path: Path) -> None:
    """A plan of so many sequences and tokens runs whatever number of the tokens is whose."""
    capture = check(
        lambda: quantize_inputs(tiny_llama(tmp_path, max_position_embeddings=512), SCHEMES[scheme]),
        steps=60,
        drafts=(0, 0, 1, 2),
    )
    assert not capture.refusal and 20 < capture.replayed <= 60 - len(capture.sizes)
    assert all(sequences <= tokens for sequences, tokens in capture.sizes)
    assert len({tokens for sequences, tokens in capture.sizes if sequences == 3}) > 2


def chunks_of_prompts(model: Model, through: Callable[[Forward], Forward], cut: int = 12) -> list[Tensor]:
    """Logits of steps of which each has a chunk of a prompt, most of one size, and before it the newest token
    of every sequence whose prompt is done."""
    draw = random.Random(5)
    lengths = [5 * cut, 4 * cut + 7, 4 * cut + 1, 6 * cut, 3]
    pages = [list(range(20 * s, 20 * s + 20)) for s in range(len(lengths))]
    draw.shuffle(pages)
    caches = allocate(model, 20 * len(lengths))

    def plain(batch: ForwardBatch) -> Tensor:
        return model.forward(batch, caches)

    forward, found = through(plain), []
    slots = list(range(len(lengths))) if state_bytes(model.cache_specs()) else None
    context = [0] * len(lengths)
    for sequence, length in enumerate(lengths):
        while context[sequence] < length:
            answers = draw.sample(range(sequence), min(sequence, 1))
            count = min(cut, length - context[sequence])
            rows = [([draw.randrange(model.vocab_size)], context[s], pages[s]) for s in answers]
            prompt = [draw.randrange(model.vocab_size) for _ in range(count)]
            rows.append((prompt, context[sequence], pages[sequence]))
            numbers = [*answers, sequence]
            batch = chunk_batch(rows, False, None if slots is None else numbers)
            found.append(forward(replace(batch, prompt_row=len(answers))).clone())
            for s, (new, _, _) in zip(numbers, rows, strict=True):
                context[s] += len(new)
    return found


@pytest.mark.parametrize("scheme", ["plain", "int8 per token", "delayed"])
def test_prompts_of_a_size_are_captured_when_it_comes_again(scheme: str, tmp_path: Path) -> None:
    """The logits of eager steps, at other contexts and pages; sizes that come once have no plan."""
    eager, captured = (quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme]) for _ in range(2))
    expected = chunks_of_prompts(eager, lambda plain: plain)
    captures: list[StepCapture] = []

    def through(plain: Forward) -> Forward:
        captures.append(StepCapture(plain))
        return captures[0].run_prompts

    found = chunks_of_prompts(captured, through)
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) == 22
    for name, tensor in eager.states.state_dict().items():
        assert torch.equal(captured.states.state_dict()[name], tensor), name
    # 12 tokens alone 5 times, behind an answer 4 + 4 + 6 times; of each two are no replays. Others come once.
    assert captures[0].replayed == 3 + 14 - 2 and captures[0].sizes == [] and not captures[0].prompt_refusal


def test_what_cannot_be_captured_of_prompts_leaves_decoding_alone(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    caches = allocate(model, 8)

    def forward(batch: ForwardBatch) -> Tensor:
        logits = model.forward(batch, caches)
        return logits if len(batch.tokens) == 1 else logits + 0.0

    capture = StepCapture(forward)
    prompt = chunk_batch([(list(range(9)), 0, [0])], False)
    found = [capture.run_prompts(prompt) for _ in range(3)]
    assert torch.equal(found[0], found[2]) and "aten.add" in capture.prompt_refusal
    for _ in range(2):
        capture.run(chunk_batch([([9], 9, [0])]))
    assert not capture.refusal and capture.replayed == 1


def test_few_plans_and_little_memory(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    expected = decode(model, lambda plain: plain)
    captures: list[StepCapture] = []

    def few(plain: Forward) -> Forward:
        captures.append(StepCapture(plain, plans=2))
        return captures[-1].run

    def small(plain: Forward) -> Forward:
        captures.append(StepCapture(plain, arena_bytes=1000))
        return captures[-1].run

    for through in (few, small):
        assert all(map(torch.equal, decode(model, through), expected))
    assert len(captures[0].sizes) == 2 and 0 < captures[0].replayed < 24
    assert captures[1].replayed == 0 and not captures[1].refusal


MIXTURES = [
    *("Mixtral", "Qwen3Moe", "Qwen3Moe with dense layers", "GptOss", "Qwen2Moe", "GraniteMoeShared", "Olmoe"),
    *("Glm4Moe in groups, normed heads", "MiniMaxM2"),
]
LATENT = ["DeepseekV2 native, biases", "DeepseekV3 native, rotated halves", "DeepseekV2 lite, yarn, native"]


@pytest.mark.parametrize("family", [*MIXTURES, *LATENT])
def test_every_mixture_of_experts(family: str, tmp_path: Path) -> None:
    """All ways to route, shared experts, biases, clamped activations; latent attention."""
    (make_checkpoint if family in MIXTURES else make_latent)(family, tmp_path)
    capture = check(lambda: load_model(open_checkpoint(str(tmp_path)), device="cpu"))
    assert not capture.refusal and capture.replayed == 30 - len(capture.sizes)


@pytest.mark.parametrize(
    "fixture",
    [
        "mxfp4/gpt_oss",
        *(
            f"gguf_families/{name}.gguf"
            for name in ("mixtral", "qwen3moe", "gpt_oss", "deepseek3", "glm4moe")
        ),
    ],
)
def test_quantized_mixtures(fixture: str) -> None:
    capture = check(lambda: load_model(open_checkpoint(str(FIXTURES / fixture)), device="cpu"))
    assert not capture.refusal and capture.replayed == 30 - len(capture.sizes)


@pytest.mark.parametrize(
    "fixture",
    [
        *("gguf_more_families/hunyuan_dense", "gguf_more_families/seed_oss"),
        *("gguf_recurrent_families/qwen35", "gguf_recurrent_families/qwen35moe"),
    ],
)
def test_norms_behind_rotations_and_heads_in_another_order(fixture: str) -> None:
    capture = check(lambda: load_model(open_checkpoint(str(FIXTURES / f"{fixture}.gguf")), device="cpu"))
    assert not capture.refusal and capture.replayed


def test_latent_rows_with_a_scale(tmp_path: Path) -> None:
    make_latent(LATENT[0], tmp_path)

    def make() -> Model:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        assert isinstance(model, MixerModel)
        for n, block in enumerate(model.blocks):
            assert isinstance(block.mixer, LatentAttention)
            model.blocks[n] = replace(block, mixer=replace(block.mixer, k_scale=0.37))
        return model

    capture = check(make)
    assert not capture.refusal and capture.replayed


@pytest.mark.parametrize("scheme", ["int8 per token", "fp8 per tensor", "mxfp4", "delayed"])
def test_experts_that_quantize_their_inputs(scheme: str, tmp_path: Path) -> None:
    make_checkpoint("Mixtral", tmp_path)

    def make() -> Model:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        assert isinstance(model, Decoder)
        asked = SCHEMES[scheme]
        assert asked is not None
        for block in model.blocks:
            assert isinstance(block.mlp, MixtureOfExperts)
            experts = block.mlp.experts
            for linear in (*experts.gate_up, *experts.down):
                state = None if asked.delay is None else model.states.add(linear.name, asked, model.device)
                linear.inputs = [InputTransform(asked, state=state)] * len(linear.weights)
            experts.grouped = GroupedExperts.of(experts.gate_up, experts.down)
        return model

    capture = check(make)
    assert not capture.refusal and capture.replayed == 30 - len(capture.sizes)


def test_experts_between_transforms(tmp_path: Path) -> None:
    """Trellises: of blocks of 128 that are transformed most rows and columns are none of the layer's."""
    make_checkpoint("Mixtral", tmp_path)

    def make() -> Model:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        assert isinstance(model, Decoder)
        for block in model.blocks:
            assert isinstance(block.mlp, MixtureOfExperts)
            experts = block.mlp.experts
            for linear in (*experts.gate_up, *experts.down):
                [weight] = linear.weights
                rows, columns = weight.shape
                linear.weights = [CpuTrellis().pack(trellis(3, "mcg", (rows, columns)), model.device)]
            experts.grouped = GroupedExperts.of(experts.gate_up, experts.down)
        return model

    capture = check(make)
    assert not capture.refusal and capture.replayed == 30 - len(capture.sizes)


def test_experts_that_run_one_by_one_say_why_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint("Mixtral", tmp_path)

    def make() -> Model:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        assert isinstance(model, Decoder) and isinstance(model.blocks[1].mlp, MixtureOfExperts)
        experts = model.blocks[1].mlp.experts
        [weight] = experts.down[3].weights
        experts.down[3].weights = [Reference().pack(weight.kernel.unpack(weight), model.device)]
        experts.grouped = GroupedExperts.of(experts.gate_up, experts.down)
        return model

    with caplog.at_level(logging.WARNING):
        capture = check(make)
    assert capture.replayed == 0 and not capture.sizes
    [record] = [r for r in caplog.records if "step capture off" in r.getMessage()]
    wanted = "model.layers.1.mlp.experts.3.down_proj runs on the kernel reference"
    assert f"model.layers.1.mlp.experts: {wanted}" in record.getMessage()


# ---- the engine ------------------------------------------------------------------------------------------


def serve(
    model: Model, *, capture: bool, forced: ForcedModes | None = None, seed: int = 3
) -> tuple[dict[str, list[int]], Engine]:
    """Requests at random times, some with shared prefixes, some with log-probabilities; their tokens."""
    draw = random.Random(seed)
    settings = Settings(
        device="cpu",
        max_total_tokens=368,
        max_running_requests=7,
        disable_cuda_graph=not capture,
        num_continuous_decode_steps=1,  # some schemes here let a step's tokens share scales
    )
    engine = Engine(model, ByteTokenizer(), settings, forced=forced or ForcedModes(check=True))
    prefix = [draw.randrange(4, 40) for _ in range(2 * PAGE + 3)]
    waiting = []
    for index in range(20):
        prompt = (prefix if index % 3 == 0 else []) + [
            draw.randrange(4, 40) for _ in range(draw.randint(1, 20))
        ]
        sampling = SamplingParams(
            temperature=0.0 if index % 2 else 1.0,
            seed=index,
            max_tokens=draw.randint(1, 30),
            ignore_eos=True,
            prompt_logprobs=1 if index % 7 == 0 else None,
        )
        waiting.append(Request(id=str(index), prompt=tuple(prompt), sampling=sampling))
    tokens: dict[str, list[int]] = {}
    while waiting or engine.has_work():
        while waiting and draw.random() < 0.3:
            engine.submit(waiting.pop())
        for event in engine.step():
            assert event.finish_reason != "error", event.error
            tokens.setdefault(event.id, []).extend(event.tokens)
    return tokens, engine


@pytest.mark.parametrize("retract", [0, 3])
@pytest.mark.parametrize("scheme", ["plain", "int8 per token", "llm.int8", "fp8 per tensor", "delayed"])
def test_the_engine_gives_the_same_tokens(scheme: str, retract: int, tmp_path: Path) -> None:
    forced = ForcedModes(retract_every=retract, check=True)

    def run(capture: bool) -> tuple[dict[str, list[int]], Engine]:
        model = quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme])
        return serve(model, capture=capture, forced=forced)

    expected, eager = run(False)
    found, captured = run(True)
    assert found == expected and len(found) == 20
    assert eager.status().captured_steps == 0
    assert 0 < captured.status().captured_steps < captured.status().steps
    for name, tensor in eager.model.states.state_dict().items():
        assert torch.equal(captured.model.states.state_dict()[name], tensor), name


@pytest.mark.parametrize("retract", [0, 3])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "DeepseekV3 native, rotated halves"])
def test_the_engine_gives_the_same_tokens_with_experts(family: str, retract: int, tmp_path: Path) -> None:
    (make_checkpoint if family in MIXTURES else make_latent)(family, tmp_path)
    forced = ForcedModes(retract_every=retract, check=True)

    def run(capture: bool) -> tuple[dict[str, list[int]], Engine]:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        return serve(model, capture=capture, forced=forced)

    expected, eager = run(False)
    found, captured = run(True)
    assert found == expected and len(found) == 20
    assert eager.status().captured_steps == 0
    assert 10 < captured.status().captured_steps < captured.status().steps


def said(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "DeepseekV3 native, rotated halves"])
def test_nan_fails_its_own_request_only_with_experts(family: str, tmp_path: Path) -> None:
    """A router that sees NaN chooses some experts; the others' tokens stay what they were."""
    (make_checkpoint if family in MIXTURES else make_latent)(family, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][39] = np.nan
    save_file(weights, file, metadata={"format": "pt"})

    def run(bad: int) -> tuple[dict[str, list[TokenEvent]], Engine]:
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
        engine = Engine(model, ByteTokenizer(), Settings(device="cpu", max_total_tokens=640))
        events: dict[str, list[TokenEvent]] = {}
        for number in range(4):
            bias = {39: 1e6} if number == bad else {39: -1e6}
            sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias=bias)
            engine.submit(Request(id=str(number), prompt=(5, 9 + number, 7), sampling=sampling))
        while engine.has_work():
            for event in engine.step():
                events.setdefault(event.id, []).append(event)
        return events, engine

    clean, _ = run(-1)
    found, engine = run(2)
    for number, events in found.items():
        assert events[-1].finish_reason == ("error" if number == "2" else "length")
        if number != "2":
            assert said(events) == said(clean[number])
    assert found["2"][-1].error_code == "model_numerical_error"
    assert engine.status().captured_steps > 5


@pytest.mark.parametrize("scheme", ["plain", "fp8 per token", "llm.int8", "fp8 per tensor", "delayed"])
def test_nan_fails_its_own_request_only(scheme: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][39] = np.nan  # a token nobody may say
    save_file(weights, file)

    def run(capture: bool) -> tuple[dict[str, list[TokenEvent]], Engine]:
        loaded = load_model(open_checkpoint(str(tmp_path)), device="cpu", dtype="bfloat16")
        assert isinstance(loaded, Decoder)
        model = quantize_inputs(loaded, SCHEMES[scheme])
        settings = Settings(
            device="cpu",
            max_total_tokens=640,
            disable_cuda_graph=not capture,
            num_continuous_decode_steps=1,  # some schemes here let a step's tokens share scales
        )
        engine = Engine(model, ByteTokenizer(), settings, forced=ForcedModes(check=True))
        events: dict[str, list[TokenEvent]] = {}
        for number in range(4):
            bias = {39: 1e6} if number == 2 else {39: -1e6}
            sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias=bias)
            engine.submit(Request(id=str(number), prompt=(5, 9 + number, 7), sampling=sampling))
        while engine.has_work():
            for event in engine.step():
                events.setdefault(event.id, []).append(event)
        return events, engine

    expected, _ = run(False)
    found, engine = run(True)
    for number, events in found.items():
        assert [event.tokens for event in events] == [event.tokens for event in expected[number]]
        assert events[-1].finish_reason == ("error" if number == "2" else "length")
    assert found["2"][-1].error_code == "model_numerical_error"
    assert engine.status().captured_steps > 5


def test_the_embedded_model_says_the_same() -> None:
    """Q4_1 and Q6_K, 30 layers: bits of every logit."""
    model = load_model(open_checkpoint("smollm2"), device="cpu")
    assert isinstance(model, Decoder) and isinstance(model.blocks[0].qkv.weights[0], NativeWeight)
    capture = check(lambda: model, steps=10)
    assert not capture.refusal and capture.replayed >= 4


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Columns for every torchao name: int4wo-256 needs 256."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": 40}
    make_float(folder, **sizes).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TORCHAO)
def test_every_torchao_name_with_capture_and_without(name: str, wide_llama: Path) -> None:
    def run(capture: bool) -> tuple[dict[str, list[int]], Engine]:
        asked = Asked(torchao_config=name)
        model = load_model(open_checkpoint(str(wide_llama)), device="cpu", quantization=asked)
        assert model.quantization == f"{name}, quantized at load" and "reference" not in model.kernels
        return serve(model, capture=capture)

    expected, eager = run(False)
    found, captured = run(True)
    assert found == expected and len(found) == 20
    assert eager.status().captured_steps == 0
    assert 10 < captured.status().captured_steps < captured.status().steps
