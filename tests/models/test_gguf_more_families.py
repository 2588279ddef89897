"""More families from GGUF files of llama.cpp's converter, against transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.layers.rotary import RopeScaling
from lowbit.loading import plan_model
from lowbit.models.config import ModelConfig
from lowbit.models.registry import family_of
from models.family_cases import check_stored_logits

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_more_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    check_stored_logits(FOLDER, name, 1e-3)


def told(name: str, **metadata: object) -> ModelConfig:
    """The config of a fixture with other metadata; None: without the key."""
    header = open_checkpoint(str(FOLDER / f"{name}.gguf"))
    kind = header.metadata["general.architecture"]
    changes = {f"{kind}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    changed = {key: value for key, value in (header.metadata | changes).items() if value is not None}
    header = replace(header, metadata=changed)
    return family_of(header).read_config(header)


@pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
def test_a_factor_alone_scales_linearly(key: str) -> None:
    """The second is the key of 2023, as DeepSeek Coder's first files have it."""
    assert told("internlm3", **{key: 4.0}).rope_scaling == RopeScaling("linear", 4.0)
    assert told("internlm3", **{key: 0.0}).rope_scaling == RopeScaling()
    assert told("internlm3", rope__scaling__type="none", **{key: 4.0}).rope_scaling == RopeScaling()


def test_granite4_is_granite_where_all_layers_are_attention() -> None:
    """Numbers of layers are one number where all are the same; ``finetuned`` is what turns rotation on."""
    config = told("granite4")
    assert config.kv_heads == 2 and not config.unrotated
    assert told("granite4", rope__scaling__finetuned=False).unrotated == {0, 1}
    with pytest.raises(LowbitError, match=r"'attention.head_count_kv' must be a whole number .* \[2, 4\]"):
        told("granite4", attention__head_count_kv=[2, 4])


@pytest.mark.parametrize("layers", [None, ["attention", "mamba"]], ids=["untold", "mixed"])
def test_granite4_with_mamba_is_refused(layers: list[str] | None) -> None:
    config = {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": layers}
    header = CheckpointHeader(Path("granite-4.0-h-micro"), "safetensors", {}, config)
    with pytest.raises(LowbitError, match="without Mamba-2 layers only") as refused:
        family_of(header)
    assert refused.value.code == "E0241"


def test_queries_of_ministral3_grow_behind_its_context() -> None:
    """Within it their factor is 1, which is all that attention has; the file keeps the whole number."""
    header = open_checkpoint(str(FOLDER / "ministral3.gguf"))
    assert header.metadata["mistral3.context_length"] == 64
    assert plan_model(header).context_length == 32
    plain = open_checkpoint(str(FOLDER / "mistral3.gguf"))  # Mistral Small 3
    assert plan_model(plain).context_length == 64
    alone = replace(header, metadata={k: v for k, v in header.metadata.items() if "rope.scaling" not in k})
    with pytest.raises(LowbitError, match=r"^error\[E0242\]: ministral3.gguf: mistral3: queries that grow"):
        plan_model(alone)
