"""Module names in quantization configs: the rules of the field, spellings, long lists, and patterns that
could run for ever."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from formats.helpers import reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import (
    StoredModule,
    auto_round,
    compressed_tensors_scheme,
    matching,
    modelopt,
    quark_scheme,
)
from lowbit.formats.matching import (
    Keys,
    compiled,
    exact,
    listed,
    matches,
    module_prefix,
    regex,
    regex_or_exact,
    sole_name,
    sole_name_or_exact,
    sole_wildcard,
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
    "pattern",
    ["(a+)+$", "(.*)*b", "((a|b)*c)+", "(a|aa)+$", "(a(b|c))*", ".*(a|b)" * 7, ".*a?" * 7, "(", "x" * 70_000],
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
        ".*model.*layers.*mlp.*experts.*gate.*proj.*",
        rf".*layers\.({'|'.join(map(str, range(2000)))})\..*",
    ],
)
def test_patterns_people_write(pattern: str) -> None:
    compiled(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        ".*a.*b", "a.*b$", "^a.*ab$", ".*", "", "$", ".+a.+", "a.b.*c", ".*?b.*?c$", r".*\.b.*\d[ab].*$",
        "a", "a$",
        ".*ab.*", "a.*b.*c.*a.*b.*c.*a.*", r"b\.a.*", ".*a.*a.*a$", ".*.*a", "[^a].*b",
    ],
)  # fmt: skip
def test_patterns_that_only_go_forward_match_what_they_say(pattern: str) -> None:
    """However many ``.*`` they have: every string of a few letters, as Python's own engine has it."""
    letters = ["", *"ab.1\n"]
    texts = {"".join(parts) for parts in itertools.product(letters, repeat=5)} | {"abcabca", "abc" * 4}
    for text in texts:
        for how in ("match", "search"):  # nobody asks where a match ends
            wanted = getattr(re.compile(pattern), how)(text) is not None
            assert (getattr(compiled(pattern), how)(text) is not None) == wanted, (pattern, text, how)


def test_a_long_pattern_on_a_long_name_ends_at_once() -> None:
    start = time.monotonic()
    assert compiled(".*a" * 200 + ".*b").match("a" * 5000) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (f"^{re.escape(Q)}$", Q),
        (f"{re.escape(Q)}$", Q),
        (r"^lm\_head$", "lm_head"),
        (r"^lm_head", None),  # any name that begins so
        (r"^model.norm$", None),  # "." is any letter
        (r"^a\.b$|c$", None),
        (r"^a\$", None),
        (r"^a\d$", None),
        (r"^(a)$", None),
        (r"(?i)a$", None),
        (r"^a[0]$", None),
        ("$", None),
        ("", None),
    ],
)
def test_patterns_of_one_name(pattern: str, name: str | None) -> None:
    assert sole_name(pattern) == name
    assert name is None or re.match(pattern, name)


NAMES = (Q, GATE, "model.layers.3.mlp.up_proj", "language_model.layers.3.mlp.up_proj", "lm_head", "mlp")


@pytest.mark.parametrize(
    ("rule", "name_of", "keys"),
    [
        (regex_or_exact, sole_name_or_exact, (Q, "re:.*self_attn", "layers.3.self_attn.q_proj", "lm_head")),
        (regex_or_exact, sole_name_or_exact, ("re:^layers\\.3\\.mlp\\.gate_up_proj$", "re:.*up_proj", "mlp")),
        (
            regex,
            sole_name,
            (r".*mlp", rf"^{re.escape(GATE)}$", r"model\.layers\.3\.self_attn\.qkv_proj$", ".*"),
        ),
        (wildcard, sole_wildcard, ("mlp", "layers.3.mlp.up_proj", "*.gate_up_proj", "*_proj", Q)),
    ],
)
def test_keys_find_what_trying_each_finds(rule: matching.Rule, name_of: Callable, keys: tuple) -> None:
    """In their order, under every spelling, names and patterns mixed."""
    for start in range(len(keys)):
        turned = keys[start:] + keys[:start]
        found = Keys([(key, key) for key in turned], rule, name_of)
        for name in NAMES:
            wanted = [key for key in turned if matches(key, name, rule)]
            assert [key for key, _ in found.all(name)] == wanted
            assert all(found.first(name) == (wanted[0] if wanted else None) for _ in range(2))
            assert found.spelled(name) == next((key for key in turned if rule(key, name)), None)


MANY = 300
EXPERTS = [f"model.layers.{n // 100}.mlp.experts.{n % 100}.down_proj" for n in range(MANY)]
GPTQ = {"bits": 4, "group_size": 32, "sym": True}
INT8 = {"weight": {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}}
ARGS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("where", "rule", "suffix", "config", "ask"),
    [
        (
            matching,
            "compiled",
            "qweight",
            {
                "quant_method": "gptq",
                **GPTQ,
                "dynamic": {f"+:^{re.escape(n)}$": {"bits": 8} for n in EXPERTS},
            },
            lambda reader, module: reader.rule_of(module).bits == 8,
        ),
        (
            auto_round,
            "compiled",
            "qweight",
            {"quant_method": "auto-round", **GPTQ, "extra_config": {n: {"bits": 8} for n in EXPERTS[1:]}},
            lambda reader, module: reader.rule_of(module).bits == 4 + 4 * (module.stored != EXPERTS[0]),
        ),
        (
            compressed_tensors_scheme,
            "regex_or_exact",
            "weight_scale",
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {
                    "a": {"targets": EXPERTS[1:], "weights": ARGS},
                    "b": {"targets": ["Linear"], "weights": {**ARGS, "num_bits": 4}},
                },
                "ignore": EXPERTS[::2],
            },
            lambda reader, module: (
                reader.layouts.config.group_of((module.stored,)).weights.bits
                == 8 - 4 * (module.stored == EXPERTS[0])
                and reader.layouts.config.ignored((module.stored,)) == (module.stored in EXPERTS[::2])
            ),
        ),
        (
            quark_scheme,
            "_pattern",
            "weight_scale",
            {
                "quant_method": "quark",
                "global_quant_config": INT8,
                "layer_quant_config": dict.fromkeys(EXPERTS, INT8),
                "exclude": EXPERTS[::2],
            },
            lambda reader, module: (
                (reader.config.rule_of(module).weight is None) == (module.stored in EXPERTS[::2])
            ),
        ),
        (
            modelopt,
            "wildcard",
            "weight_scale",
            {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": EXPERTS[::2]},
            lambda reader, module: (
                bool(reader.excluded.first(module.stored)) == (module.stored in EXPERTS[::2])
            ),
        ),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_rules_for_every_module_are_looked_up(
    where: object,
    rule: str,
    suffix: str,
    config: dict,
    ask: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mixture's names are not tried one by one against each of its modules."""
    tried = 0
    plain = getattr(where, rule)

    def counted(*arguments: str) -> object:
        nonlocal tried
        tried += 1
        return plain(*arguments)

    monkeypatch.setattr(where, rule, counted)
    tensors = {f"{name}.{suffix}": torch.zeros(1) for name in EXPERTS}
    reader = reader_of(write_folder(tmp_path, tensors, config))
    for _ in range(2):
        assert all(ask(reader, StoredModule(name, name, (64, 64))) for name in EXPERTS)
    assert tried <= 2 * MANY
