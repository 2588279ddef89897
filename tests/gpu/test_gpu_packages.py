"""humming-kernels and FlashInfer behind their adapters: what they are given, by stand-ins that compute it.

Neither package runs without a GPU. Where one is installed, its signatures are read from its source too.
"""

from __future__ import annotations

import ast
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_helpers import BF16, E4M3, F16, draw, expected, make_batch, plain, simulate, spec_of, whole
from attention_helpers import hand_out_pages as pages_for
from gpu import package_stand_ins
from gpu.package_stand_ins import humming_forward, install_flashinfer, install_humming
from lowbit.engine.static_batch import StaticBatch
from lowbit.errors import LowbitError
from lowbit.kernels import Use, choose, linear_kernels, refusal
from lowbit.kernels.attention import AttentionParameters, CacheSpec, choose_attention
from lowbit.kernels.gpu import flashinfer, trial
from lowbit.kernels.gpu.flashinfer import FlashInferAttention, flashinfer_attention, pages_of
from lowbit.kernels.gpu.humming import GpuHumming, _config
from lowbit.kernels.gpu.humming_form import Form, form_of, tensors_of
from lowbit.kernels.reference import Reference
from lowbit.loading.kernel_choice import KernelChoice, KernelRules
from lowbit.loading.samples import sample_of
from lowbit.loading.self_check import check_packed
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme, dense

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (128, 256)


def scheme_of(codes: str, *levels: tuple[int, int, str], **more: Any) -> Scheme:
    blocks = tuple((rows, columns) for rows, columns, _ in levels)
    zero = "integer" if codes.startswith("uint") else "none"
    scales = tuple(number_format(name) for _, _, name in levels)
    return Scheme(number_format(codes), blocks, scales, **{"zero": zero, **more})


SCHEMES = [
    *(scheme_of(f"int{bits}", (1, 64, "bf16")) for bits in range(1, 9)),
    *(scheme_of(f"uint{bits}", (1, 32, "f16")) for bits in range(1, 9)),
    scheme_of("int4", (1, 0, "f16")),
    scheme_of("uint4", (1, 256, "bf16")),
    scheme_of("int8", (0, 0, "bf16")),
    scheme_of("int8", (0, 0, "f32")),
    scheme_of("int4", (0, 128, "f16")),
    scheme_of("e4m3", (1, 0, "bf16")),
    scheme_of("e5m2", (0, 0, "f32")),
    scheme_of("e2m3", (1, 32, "e8m0")),
    scheme_of("e2m1", (1, 32, "e8m0")),
    scheme_of("e2m1", (1, 16, "e4m3"), (0, 0, "f32")),
]


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial's result of another test."""
    monkeypatch.setattr(trial, "_faults", {})


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch, _fresh: None) -> GpuHumming:
    """Installed, beside a Hopper GPU that answers questions only."""
    install_humming(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return GpuHumming()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_humming_multiplies_the_numbers_that_are_meant(scheme: Scheme, humming: GpuHumming) -> None:
    assert humming.refuses(scheme, SHAPE, CUDA) is None
    weight = trial.random_weight(scheme, SHAPE)
    packed = humming.pack(weight, CPU)
    reference = Reference().pack(weight, CPU)
    x = torch.randn(5, SHAPE[1], generator=torch.Generator().manual_seed(7)).to(packed.inputs)
    wanted = Reference().linear(x.float(), reference)
    close = {"rtol": 2**-8, "atol": float(2**-8 * wanted.abs().max() / 16)}
    torch.testing.assert_close(humming.linear(x, packed).float(), wanted, **close)
    wide = torch.full((5, SHAPE[0] + 32), torch.nan)
    humming.linear(x, packed, wide[:, 32:])
    torch.testing.assert_close(wide[:, 32:], wanted, **close)
    assert wide[:, :32].isnan().all()
    there = torch.full((5, SHAPE[0]), torch.nan, dtype=packed.inputs)
    assert humming.linear(x.float(), packed, there) is there
    torch.testing.assert_close(there.float(), wanted, **close)
    assert humming.linear(x[:0], packed).shape == (0, SHAPE[0])
    assert packed.nbytes <= 1.1 * humming.nbytes(scheme, SHAPE) + 4 * 2048


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (dense("bf16"), "takes whole numbers of 1 to 8 bits and e2m1, e2m3, e3m2, e4m3, e5m2, got bf16"),
        (Scheme(number_format("gguf_q4_k")), "got gguf_q4_k"),
        (scheme_of("nf4", (1, 64, "bf16")), "got nf4"),
        (scheme_of("int4", (1, 64, "bf16"), reordered=True), "no act-order"),
        (scheme_of("int4", (1, 64, "bf16"), offset=True), "no offsets"),
        (scheme_of("int4", (1, 64, "bf16"), flattened=True), "no flattened or scattered blocks"),
        (scheme_of("uint4", (1, 64, "bf16"), zero="float"), "whole zero points"),
        (scheme_of("uint4", (1, 64, "bf16"), zero="none"), "whole zero points for unsigned codes"),
        (scheme_of("int4", (1, 64, "bf16"), zero="integer"), "none for others"),
        (scheme_of("int4", (1, 64, "f32")), "other scales would be rounded"),
        (scheme_of("e4m3", (1, 0, "f32")), "other scales would be rounded"),
        (scheme_of("e4m3", (128, 128, "bf16")), "got 128 x 128"),
        (scheme_of("int4", (1, 8, "bf16")), "groups of 16, 32, 64 … columns, got 1 x 8"),
        (scheme_of("int4", (1, 96, "bf16")), "got 1 x 96"),
        (scheme_of("e2m1", (1, 16, "e4m3")), "e4m3 under such a one"),
        (scheme_of("e2m1", (1, 16, "e4m3"), (1, 0, "f32")), "e4m3 under such a one"),
        (scheme_of("e4m3", (1, 0, "e8m0")), "takes e8m0 scales for groups of columns only"),
    ],
    ids=str,
)
def test_humming_refuses_what_it_would_round_or_cannot_hold(scheme: Scheme, reason: str) -> None:
    found = form_of(scheme, SHAPE)
    assert isinstance(found, str) and reason in found


def test_humming_says_where_it_does_not_run(humming: GpuHumming, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES[3]
    assert humming.refuses(scheme, (100, 256), CUDA) == (
        "needs rows and columns in multiples of 64, got 100 x 256"
    )
    assert humming.refuses(scheme, SHAPE, CPU) == "needs an NVIDIA GPU, got cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    needs = "needs compute capability 8.0 for torch.bfloat16 inputs, got 7.5"
    assert humming.refuses(scheme, SHAPE, CUDA) == needs
    assert humming.refuses(scheme_of("int4", (1, 64, "f16")), SHAPE, CUDA) is None
    monkeypatch.setattr("lowbit.kernels.gpu.humming.find_spec", lambda name: None)
    missing = "humming-kernels is not installed (pip install 'lowbit[humming]')"
    assert humming.refuses(scheme, SHAPE, CUDA) == missing


def test_zero_points_that_need_another_bit_are_an_error(humming: GpuHumming) -> None:
    weight = trial.random_weight(scheme_of("uint4", (1, 64, "f16")), SHAPE)
    assert weight.zeros is not None
    weight.zeros[3, 2] = 16  # GPTQ's first layout can say it
    with pytest.raises(LowbitError, match="4 bits of a code, up to 15, got 0 to 16; give this") as caught:
        humming.pack(weight, CPU)
    assert caught.value.code == "E0414"


def test_humming_gives_no_weight_back_and_takes_x_of_the_scales_type(humming: GpuHumming) -> None:
    packed = humming.pack(trial.random_weight(SCHEMES[3], SHAPE), CPU)
    for call in (lambda: humming.unpack(packed), lambda: humming.rows(packed, torch.tensor([1]))):
        with pytest.raises(LowbitError, match="cannot give a weight back; use gpu_blocks"):
            call()
    with pytest.raises(LowbitError, match="takes torch.bfloat16 x, got torch.float16"):
        humming.linear(torch.zeros(1, SHAPE[1], dtype=torch.float16), packed)
    with pytest.raises(LowbitError, match="input has 255 columns, weight 256"):
        humming.linear(torch.zeros(1, 255), packed)


def test_the_check_at_load_and_timing_give_x_its_type(humming: GpuHumming) -> None:
    weight = trial.random_weight(scheme_of("int4", (1, 64, "f16")), SHAPE)
    packed = humming.pack(weight, CPU)
    check_packed(weight, packed)
    other = trial.random_weight(scheme_of("int4", (1, 64, "f16")), (256, 256))
    with pytest.raises(LowbitError, match="kernel 'gpu_humming' gives"):
        check_packed(replace(other, codes=other.codes.flip(1)), humming.pack(other, CPU))
    run = sample_of(weight, humming, None, CPU).run
    x = torch.ones(2, SHAPE[1], dtype=torch.bfloat16)
    torch.testing.assert_close(run(x), humming.linear(x.half(), packed))


def test_the_trial_notices_wrong_products_and_failures(
    humming: GpuHumming, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for scheme in SCHEMES[:2] + SCHEMES[-2:]:
        assert humming.unfit(scheme, SHAPE, CPU, Use()) is None

    def half(config: Any, inputs: Tensor, outputs: Tensor, **more: Any) -> Tensor:
        humming_forward(config, inputs, outputs=outputs, **more)
        outputs[-1, -1] += inputs.float().norm().to(outputs.dtype)
        return outputs

    install_humming(monkeypatch, half)
    other = scheme_of("int4", (1, 64, "f16"))
    with caplog.at_level(logging.WARNING, "lowbit"):
        reasons = [humming.unfit(other, SHAPE, CPU, Use()) for _ in range(2)]
    assert reasons[0] == reasons[1] and str(reasons[0]).startswith(
        "its self-test with int4 1x64 f16 failed: results are off by"
    )
    assert len(caplog.records) == 1, "said once"

    def broken(*arguments: Any, **more: Any) -> Tensor:
        raise RuntimeError("nvcc was not found\nand much more")

    install_humming(monkeypatch, broken)
    reason = humming.unfit(scheme_of("int5", (1, 64, "f16")), SHAPE, CPU, Use())
    assert reason == "its self-test with int5 1x64 f16 failed: RuntimeError: nvcc was not found"


def test_humming_runs_by_name_only_and_never_where_rows_are_looked_up(
    humming: GpuHumming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.humming._trial", lambda *arguments: "")
    monkeypatch.setattr("lowbit.kernels.gpu.runtime.missing", lambda: "")
    scheme = scheme_of("int4", (1, 64, "f16"))
    assert linear_kernels()[-1].name == "gpu_humming"
    assert choose(scheme, SHAPE, CUDA).kernel.name == "gpu_blocks"

    def kernels(rules: str, inputs: torch.dtype) -> KernelChoice:
        choice = KernelChoice(KernelRules.parse(rules))
        choice.inputs = inputs
        return choice

    named = kernels("gpu_humming", torch.float16)
    assert (
        named.of(named.wanted("layers.0.up_proj", "linear"), scheme, SHAPE, CUDA).kernel.name == "gpu_humming"
    )
    looked_up = named.of(named.wanted("embed_tokens", "embedding"), scheme, SHAPE, CUDA)
    assert looked_up.kernel.name == "gpu_blocks", "left to auto"
    pattern = kernels("embed_tokens=gpu_humming", torch.float16)
    with pytest.raises(LowbitError, match="gpu_humming cannot run int4.*: rows cannot be looked up"):
        pattern.of(pattern.wanted("embed_tokens", "embedding"), scheme, SHAPE, CUDA)
    other = kernels("gpu_humming", torch.bfloat16)
    with pytest.raises(LowbitError, match="f16 scales need float16 inputs, .* are bfloat16: --dtype float16"):
        other.of(other.wanted("layers.0.up_proj", "linear"), scheme, SHAPE, CUDA)

    first = (GpuHumming(), *linear_kernels()[:-1])  # the one line that a measurement would change
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: first)
    assert choose(scheme, SHAPE, CUDA, Use(inputs=torch.float16)).kernel.name == "gpu_humming"
    for use in (Use(inputs=torch.bfloat16), Use(lookup=True, inputs=torch.float16)):
        choice = choose(scheme, SHAPE, CUDA, use)
        assert choice.kernel.name == "gpu_blocks" and choice.refusals[0][0] == "gpu_humming"
    assert refusal(GpuHumming(), scheme, SHAPE, CPU, Use()) == "needs an NVIDIA GPU, got cpu"


SERVED: dict[str, tuple[CacheSpec, int, float]] = {
    "bf16": (spec_of(2, 64), 1, 0.0),
    "fp16 grouped": (spec_of(1, 128, dtype=F16), 6, 0.0),
    "e4m3 grouped": (spec_of(2, 64, dtype=E4M3), 4, 0.0),
    "window": (spec_of(2, 64, window=20), 2, 0.0),
    "soft cap": (spec_of(1, 256), 3, 5.0),
}


@pytest.fixture
def infer(monkeypatch: pytest.MonkeyPatch, _fresh: None) -> FlashInferAttention:
    install_flashinfer(monkeypatch)
    return FlashInferAttention()


@pytest.mark.parametrize("case", SERVED)
def test_flashinfer_is_given_each_sequences_pages(case: str, infer: FlashInferAttention) -> None:
    spec, group, softcap = SERVED[case]
    sequences = draw(spec, group, [37, 16, 1, 50])
    parameters = replace(plain(spec), softcap=softcap)
    steps = [
        [(0, 0, 20), (1, 0, 16)],
        [(0, 20, 36), (2, 0, 1), (3, 0, 48)],  # of unlike lengths
        [(3, 48, 49), (0, 36, 37)],  # a token each, in another order
        [(3, 49, 50)],
    ]
    for tried in (steps, whole(sequences)):
        outputs = simulate(spec, sequences, tried, parameters, infer)
        for sequence, found in zip(sequences, outputs, strict=True):
            wanted = expected(spec, sequence, parameters).float()
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


def test_one_plan_serves_the_layers_of_a_step(
    infer: FlashInferAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def noted(kind: type) -> Any:
        def make(*arguments: Any, **more: Any) -> Any:
            made.append(kind(*arguments, **more))
            return made[-1]

        return make

    stand_ins = package_stand_ins
    install_flashinfer(
        monkeypatch,
        BatchDecodeWithPagedKVCacheWrapper=noted(stand_ins.Decode),
        BatchPrefillWithPagedKVCacheWrapper=noted(stand_ins.Prefill),
    )
    spec, windowed = spec_of(1, 64), spec_of(1, 64, window=9)
    pages, count = pages_for([40, 40])
    caches = [infer.allocate(one, count, 16, CPU) for one in (spec, spec, windowed)]
    for step in ([(0, 0, 30), (1, 0, 3)], [(0, 30, 31), (1, 3, 4)], [(0, 31, 32), (1, 4, 5)]):
        batch = make_batch(step, pages)
        tokens = len(batch.tokens)
        for cache in caches:
            infer.write(cache, torch.ones(tokens, 1, 64), torch.ones(tokens, 1, 64), batch)
            infer.attend(torch.ones(tokens, 1, 64), cache, batch, plain(spec))
    kinds = [(type(wrapper).__name__, wrapper.plans) for wrapper in made]
    assert kinds == [("Prefill", 1), ("Prefill", 1), ("Decode", 2), ("Decode", 2)]


def test_lengths_come_from_the_host_and_never_from_a_recorded_step() -> None:
    pages, _ = pages_for([40, 33])
    batch = make_batch([(0, 30, 31), (1, 31, 32)], pages)
    queries, contexts = batch.query_lengths.numpy(), batch.context_lengths.numpy()
    told = replace(batch, host_lengths=(queries.copy(), contexts.copy()))
    broken = replace(told, query_lengths=queries, context_lengths=contexts)  # numpy: no tensor to read
    for one in (batch, told, broken):
        found = pages_of(one)
        assert found.decodes and found.indices.tolist() == [*pages[0][:2], *pages[1][:2]]
        assert found.page_starts.tolist() == [0, 2, 4] and found.last_lengths.tolist() == [15, 16]
        assert found.query_starts.tolist() == [0, 1, 2]
    static = StaticBatch((8, 8, 8), CPU)
    static.fill(told)
    assert static.view(2, 2, 16, 64).host_lengths is None
    assert told.to(CPU).host_lengths is told.host_lengths


def test_flashinfer_says_what_it_does_not_serve(
    infer: FlashInferAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert infer.refuses(spec_of(1, 64), CPU) == "needs an NVIDIA GPU, got cpu"
    for spec, reason in (
        (CacheSpec("latent", 1, 576, 512, BF16), "serves paged caches, got latent"),
        (replace(spec_of(1, 64), sinks=True), "has no attention sinks"),
        (spec_of(1, 80), "needs heads of 64, 128, 256 channels, got 80 and 80"),
        (spec_of(1, 64, 128), "got 64 and 128"),
        (spec_of(1, 64, dtype=KvDtype.of("int8")), "got int8 with a scale for every token"),
        (spec_of(1, 64, dtype=KvDtype.of("fp8_e4m3")), "got fp8_e4m3 with a scale for every token"),
        (spec_of(1, 64, dtype=KvDtype.of("f32")), "got f32"),
        (spec_of(1, 64, dtype=KvDtype.of("bf16", "fp16")), "K and V alike, got bf16 for K, fp16 for V"),
    ):
        assert reason in str(infer.refuses(spec, CUDA))
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: None)
    missing = "FlashInfer is not installed (pip install 'lowbit[flashinfer]')"
    assert infer.refuses(spec_of(1, 64), CUDA) == missing
    parameters = AttentionParameters(1.0, sinks=torch.zeros(1))
    cache = infer.allocate(spec_of(1, 64), 1, 16, CPU)
    with pytest.raises(LowbitError, match="'gpu_flashinfer' has no attention sinks"):
        infer.attend(torch.zeros(1, 1, 64), cache, make_batch([(0, 0, 1)], [[0]]), parameters)


@pytest.mark.parametrize("case", SERVED)
def test_flashinfers_trial(case: str, infer: FlashInferAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SERVED[case][0], heads=2)
    assert flashinfer._trial(spec, CPU) == ""

    class Wrong(package_stand_ins.Decode):
        def run(self, *arguments: Any, **more: Any) -> Tensor:
            out = super().run(*arguments, **more)
            out[-1] = out[-1].roll(1, -1)
            return out

    install_flashinfer(monkeypatch, BatchDecodeWithPagedKVCacheWrapper=Wrong)
    assert flashinfer._trial(spec, CPU).startswith("results are off by")
    monkeypatch.setattr(flashinfer, "_trial", lambda spec, device: "results are off")
    assert "its self-test with " in str(infer.refuses(spec, CUDA))


def test_attention_backends_by_name(monkeypatch: pytest.MonkeyPatch, _fresh: None) -> None:
    install_flashinfer(monkeypatch)
    monkeypatch.setattr(flashinfer, "_trial", lambda spec, device: "")
    monkeypatch.setattr("lowbit.kernels.gpu.runtime.missing", lambda: "")
    spec = spec_of(1, 64)
    assert choose_attention(spec, CUDA).name == "gpu"
    assert choose_attention(spec, CUDA, "triton").name == "gpu"
    assert choose_attention(spec, CUDA, "flashinfer") is flashinfer_attention()
    assert choose_attention(spec, CPU, "reference").name == "reference"
    with pytest.raises(LowbitError, match="has no attention sinks; or drop --attention-backend flashinfer"):
        choose_attention(replace(spec, sinks=True), CUDA, "flashinfer")


# What the adapters pass, by name; the packages' own signatures must have it.
PASSED = {
    "humming": {
        ("schema/humming.py", "HummingWeightSchema"): {
            *("b_dtype", "bs_dtype", "weight_scale_group_size", "weight_scale_type", "weight_scale_2_type"),
            "has_zero_point",
        },
        ("transform.py", "prepare_layer_config"): {
            *("shape_n", "shape_k", "weight_schema", "torch_dtype", "device"),
        },
        ("transform.py", "transform_humming_tensors"): {"config", "tensors"},
        ("forward.py", "humming_forward"): {
            *(
                "config",
                "inputs",
                "weight",
                "weight_scale",
                "zero_point",
                "weight_scale_2",
                "outputs",
                "locks",
            ),
        },
    },
    "flashinfer": {
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper.__init__"): {
            *("float_workspace_buffer", "kv_layout", "use_tensor_cores"),
        },
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper.plan"): {
            *("indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size"),
        },
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper._plan_impl"): {
            *(
                "pos_encoding_mode",
                "window_left",
                "logits_soft_cap",
                "q_data_type",
                "kv_data_type",
                "sm_scale",
            ),
        },
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper.run"): {"q", "paged_kv_cache"},
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper.__init__"): {
            "float_workspace_buffer",
            "kv_layout",
        },
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper.plan"): {
            *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads"),
            *("num_kv_heads", "head_dim_qk", "page_size", "causal", "pos_encoding_mode", "window_left"),
            *("logits_soft_cap", "q_data_type", "kv_data_type", "sm_scale"),
        },
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper.run"): {"q", "paged_kv_cache"},
    },
}


@pytest.mark.parametrize("package", PASSED)
def test_the_installed_package_has_the_parameters_that_are_passed(package: str) -> None:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    for (file, name), parameters in PASSED[package].items():
        tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text())
        assert parameters <= _parameters(tree.body, name.split(".")), name


def _parameters(body: list[ast.stmt], name: list[str]) -> set[str]:
    """Of the last definition of that name, which overloads stand before; fields, of a dataclass."""
    [*_, found] = [node for node in body if getattr(node, "name", None) == name[0]]
    if len(name) > 1:
        assert isinstance(found, ast.ClassDef)
        return _parameters(found.body, name[1:])
    if isinstance(found, ast.ClassDef):
        targets = [node.target for node in found.body if isinstance(node, ast.AnnAssign)]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    assert isinstance(found, ast.FunctionDef)
    return {parameter.arg for parameter in (*found.args.args, *found.args.kwonlyargs)}


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_installed_humming_accepts_the_tensors(
    scheme: Scheme, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where its kernels are needed: a layer on Ampere or Hopper, the tensors checked and padded."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    pytest.importorskip("humming", exc_type=ImportError)
    device = pytest.importorskip("humming.device", exc_type=ImportError)
    from humming.transform import check_and_pad_tensors

    known = SimpleNamespace(sm_version=generation, sm_major=generation // 10, is_ppu=False)
    monkeypatch.setattr(device.DeviceInfo, "_instances", {})
    monkeypatch.setattr(device.DeviceInfo, "_get_value", lambda self: known)
    extension = SimpleNamespace(_DeviceInfo=lambda index: known)
    monkeypatch.setattr(device, "_get_device_info_extension", lambda: extension)
    form = form_of(scheme, SHAPE)
    assert isinstance(form, Form)
    config = _config(form, SHAPE, torch.device("cuda", 0))
    tensors = tensors_of(trial.random_weight(scheme, SHAPE), form, CPU)
    assert set(check_and_pad_tensors(config, tensors)) == set(tensors)
    assert config.weight_scale_group_size == form.group and config.has_zero_point == form.zeros
