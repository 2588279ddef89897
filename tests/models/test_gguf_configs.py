"""What GGUF metadata say of windows and caps: keys that newer files have, and what older ones leave out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig
from lowbit.models.registry import family_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def told(name: str, **metadata: object) -> ModelConfig:
    """The config of a fixture with other metadata; None: without the key."""
    [path] = FIXTURES.glob(f"gguf*families/{name}.gguf")
    header = open_checkpoint(str(path))
    kind = header.metadata["general.architecture"]
    changes = {f"{kind}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    changed = {key: value for key, value in (header.metadata | changes).items() if value is not None}
    header = replace(header, metadata=changed)
    return family_of(header).read_config(header)


def windows(name: str, layers: int, **metadata: object) -> list[int]:
    """1 where a layer has a window."""
    return [int(size > 0) for size in told(name, block_count=layers, **metadata).windows]


PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4, "exaone4": 4}


@pytest.mark.parametrize("name", PERIODS)
def test_the_pattern_of_windows(name: str) -> None:
    """A list of layers, or the number of layers to one that sees all; without the key the family's own."""
    key = "attention__sliding_window_pattern"
    own = [int((n + 1) % PERIODS[name] != 0) for n in range(8)]
    assert windows(name, 8, **{key: None}) == own
    assert windows(name, 8, **{key: 3}) == [1, 1, 0, 1, 1, 0, 1, 1]
    listed = [True, False, False, True, True, True, False, True]
    assert windows(name, 8, **{key: listed}) == [int(inside) for inside in listed]
    with pytest.raises(LowbitError, match=r"E0216.*window_pattern lists 2 layers and the model has 8"):
        windows(name, 8, **{key: [True, False]})


def test_layers_without_a_window_do_not_rotate_whatever_tells_them() -> None:
    assert told("cohere2", block_count=4, attention__sliding_window_pattern=2).unrotated == {1, 3}


def test_gemma2_of_june_2024_has_its_caps_and_window() -> None:
    """Its files came before the keys, of which llama.cpp takes the model's own values."""
    keys = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = told("gemma2", attention__sliding_window=None, **keys)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert max(config.windows) == 4096
    assert told("gemma2", attn_logit_softcapping=20.0).attention_softcap == 20.0


def test_gemma3_without_a_window_sees_all() -> None:
    """Files of models whose layers all see all tokens have no such key."""
    assert not any(told("gemma3", attention__sliding_window=None).windows)


@pytest.mark.parametrize(
    ("layers", "context", "window"), [(32, 4096, 2047), (40, 4096, 2047), (32, 131072, 0), (24, 4096, 0)]
)
def test_phi3_of_spring_2024_has_its_window(layers: int, context: int, window: int) -> None:
    values = {"block_count": layers, "context_length": context}
    config = told("phi3", attention__sliding_window=None, **values)
    assert config.windows == ((window,) * layers if window else ())
    assert told("phi3", attention__sliding_window=0, **values).windows == ()


@pytest.mark.parametrize("name", ["exaone4", "exaone_moe"])
def test_layers_that_predict_further_tokens_are_not_the_models_own(name: str) -> None:
    config = told(name, block_count=3, nextn_predict_layers=1)
    assert config.layers == 2 and len(config.windows) == 2


def test_layers_of_deepseek_that_predict_further_tokens_are_not_its_own() -> None:
    """The converter counts those of GLM-4.7-Flash among the blocks."""
    config = told("deepseek3", block_count=4, nextn_predict_layers=1)
    assert config.layers == 3 and config.moe is not None and max(config.moe.layers) == 2
