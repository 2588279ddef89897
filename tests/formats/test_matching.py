"""Module names in quantization configs: the rules of the field, spellings, and patterns that could run "
"for ever."""

from __future__ import annotations

import time

import pytest

from lowbit.errors import LowbitError
from lowbit.formats.matching import (
    compiled,
    exact,
    listed,
    module_prefix,
    regex_or_exact,
    spellings,
    wildcard,
)

Q = "model.layers.3.self_attn.q_proj"
GATE = "model.layers.3.mlp.gate_proj"


@pytest.mark.parametrize(
    "prefix", ["model.", "model.language_model.", "language_model.model.", "language_model.", ""]
)
def test_every_prefix_spells_the_same_module(prefix: str) -> None:
    assert listed(Q, [f"{prefix}layers.3.self_attn.q_proj"], exact)
    assert listed(f"{prefix}layers.3.self_attn.q_proj", [Q], exact)


def test_fused_names_stand_for_their_parts() -> None:
    assert listed(Q, ["model.layers.3.self_attn.qkv_proj"], exact)
    assert listed(GATE, ["model.layers.3.mlp.gate_up_proj"], exact)
    assert listed(GATE, ["re:.*gate_up_proj"], regex_or_exact)
    assert not listed("model.layers.3.self_attn.o_proj", ["model.layers.3.self_attn.qkv_proj"], exact)


def test_a_pattern_for_a_part_does_not_catch_its_neighbour() -> None:
    assert not listed(GATE, ["re:.*up_proj"], regex_or_exact)
    assert listed("model.layers.3.mlp.up_proj", ["re:.*up_proj"], regex_or_exact)


@pytest.mark.parametrize(
    ("rule", "key", "name", "wanted"),
    [
        (module_prefix, "model.layers.3", Q, True),
        (module_prefix, "model.layers.3", "model.layers.31.mlp.up_proj", False),
        (module_prefix, "lm_head", "lm_head", True),
        (module_prefix, "q_proj", Q, True),
        (module_prefix, "mlp.gate", GATE, False),
        (module_prefix, "head", "lm_head", True),
        (module_prefix, "p_proj", "model.layers.3.mlp.up_proj", True),
        (module_prefix, "model.layers.*.self_attn", Q, True),
        (regex_or_exact, "re:.*self_attn", Q, True),
        (regex_or_exact, "re:self_attn", Q, False),
        (regex_or_exact, "self_attn", Q, False),
        (wildcard, "*q_proj", Q, True),
        (wildcard, "self_attn", Q, True),
        (wildcard, "model.layers.3.*", Q, True),
        (wildcard, "model.layers.[12].*", Q, False),
    ],
)
def test_rules(rule: object, key: str, name: str, wanted: bool) -> None:
    assert rule(key, name) is wanted  # type: ignore[operator]


def test_the_name_itself_comes_first() -> None:
    assert spellings(Q)[0] == Q


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*b", "((a|b)*c)+", "(a|aa)+$", ".*.*" * 5, "(", "x" * 2000]
)
def test_patterns_that_could_run_for_ever(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(LowbitError) as caught:
        compiled(pattern).match("a" * 60)
    assert caught.value.code == "E0212" and time.monotonic() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*mlp\.gate$",
        r"(?:model\.)?layers\.(\d+)\..*_proj",
        r".*\.(q|k|v)_proj$",
        r"model\.layers\.[0-3]\..*",
    ],
)
def test_patterns_people_write(pattern: str) -> None:
    compiled(pattern)
