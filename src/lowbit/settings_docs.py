"""docs/options.md, made from ``settings``: ``python -m lowbit.settings_docs > docs/options.md``."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.commands.sglang_flags import COMPARED, ONLY, REFUSED, REFUSED_PREFIXES, WITHOUT_EFFECT
from lowbit.quantize.specification import METHODS, TORCHAO, Choice
from lowbit.settings import GROUPS, Settings, default_of, flag_of, range_text, type_of, variable_of

_INTRODUCTION = """\
# Options

Made from `src/lowbit/settings.py` by `make docs`; a test compares the two.

Every option is a flag and an environment variable; a flag beats the variable, the variable the default.
Switches take no value on the command line and `1` or `0` in the environment. `lowbit serve` takes all
groups, `lowbit chat`, `generate` and `inspect` the first two, `lowbit pull` the first; every command takes
the last one.
"""

_SGLANG = """\
## SGLang's flags

`python -m lowbit.launch_server` and `lowbit serve` take the names above and, so that a launch line written
for SGLang works unchanged, these flags. *Accepted*: an option of lowbit; every other option above that SGLang
has too means the same. *Without effect*: accepted with a note. *Only*: the one value is accepted. *Refused*:
an error that says what to do instead; `…` stands for all that begin so.

| SGLang's flag | Here | Meaning, reason, or what instead |
| --- | --- | --- |
"""


_METHODS = """\
## Quantizing at load

A float checkpoint (f32, f16, bf16) is quantized while it loads, layer by layer, with `--quantization METHOD`
or `METHOD:option=value,option=value`, with `--torchao-config NAME`, or with a recipe. `lowbit inspect MODEL
--quantization METHOD` shows beforehand what each layer becomes, its size and its error. Norms, routers and
gates are never quantized; embeddings, the head and tiny layers only where a recipe names them (and
by `gguf`, whose mixes define them). A layer a method cannot take stays as it is, with a line in the log, or
is an error under `--strict`.

| Method | What it does | Options (default) |
| --- | --- | --- |
"""

_RECIPES = """\

`--torchao-config` takes {torchao}: torchao 0.18's numerics on lowbit's kernels. They are methods of recipes
too.

### Recipes

`--quantization-recipe FILE.toml` gives parts of a model different methods. The first rule that names a module
decides, `default` the rest; without a default they stay as they are.

```toml
default = "fp8"

[[rule]]
modules = ["attention", "*.layers.0.*"]
quantization = "int8wo"

[[rule]]
modules = "experts"
quantization = "rtn"
bits = 3
group_size = 64

[[rule]]
modules = "head"
quantization = "bf16"
```

`modules` is one pattern or a list: a role (`attention`, `mlp`, `experts`, `head`, `embedding`), a shell
pattern for the whole name (`*.self_attn.*`), some dotted parts of it (`down_proj`, `layers.0.mlp`), or `re:`
and a regular expression. Instead of a method, `keep` leaves a module as it is stored and `bf16`, `f16`, `f32`
cast it.
`--quantization-ignore` takes the same patterns, comma-separated.
"""


def methods_section() -> str:
    """The table of online methods, and recipes."""
    alike: dict[tuple[str, int], list[str]] = {}  # methods of one file and the same options share a row
    for name, entry in METHODS.items():
        if name not in TORCHAO:
            alike.setdefault((entry.module, hash(tuple(entry.options.items()))), []).append(name)
    rows = []
    for names in alike.values():
        entry = METHODS[names[0]]
        options = "; ".join(map(_choice, entry.options.items())) or "-"
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {entry.summary} | {options} |")
    listed = ", ".join(f"`{name}`" for name in TORCHAO)
    return _METHODS + "\n".join(rows) + "\n" + _RECIPES.format(torchao=listed)


def _choice(named: tuple[str, Choice]) -> str:
    """An option in a cell: its name, what it takes, its default."""
    name, choice = named
    default = str(choice.default).lower() if isinstance(choice.default, bool) else choice.default
    shown = "" if default in (None, "") else f" ({default})"
    takes = f": {', '.join(choice.choices)}" if choice.choices else f": {choice.help}"
    return f"`{name}`{shown}{takes}".replace("|", "\\|")


def options_page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n\n| Flag | Variable | Default | Meaning |\n| --- | --- | --- | --- |")
        parts[-1] += "".join(_row(name) for name, rule in Settings.options().items() if rule.group == group)
        parts[-1] += "\n"
    parts += [methods_section(), sglang_section()]
    return "\n".join(parts)


def sglang_section() -> str:
    """What each of SGLang's flags does here: options with their differences, then the rest by kind."""
    rows = [f"| `{flag_of(name)}` | accepted | {text} |" for name, text in COMPARED.items()]
    for name in COMPARED:
        for value, instead in Settings.options()[name].refused:
            rows.append(f"| `{flag_of(name)} {value}` | refused | {instead} |")
    rows += _grouped("without effect", {flag: reason for flag, (_, reason) in WITHOUT_EFFECT.items()})
    rows += _grouped("only", {flag: f"`{only}`: {why}" for flag, (only, why) in ONLY.items()})
    rows += _grouped("refused", REFUSED)
    rows += _grouped("refused", {f"{start}…": reason for start, reason in REFUSED_PREFIXES.items()})
    return _SGLANG + "\n".join(rows) + "\n"


def _grouped(kind: str, reasons: Mapping[str, str]) -> list[str]:
    """One row for all flags of one reason."""
    alike: dict[str, list[str]] = {}
    for flag, reason in reasons.items():
        alike.setdefault(reason, []).append(f"`{flag}`")
    return [f"| {', '.join(flags)} | {kind} | {reason} |" for reason, flags in alike.items()]


def _row(name: str) -> str:
    rule, default = Settings.options()[name], default_of(Settings, name)
    kind, _ = type_of(Settings, name)
    flags = ", ".join(f"`{flag}`" for flag in (flag_of(name), *rule.aliases))
    shown = "off" if default is False else "" if default in (None, "") else f"`{default}`"
    meaning = rule.help
    if rule.choices:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in rule.choices)}."
    elif kind in (int, float) and (rule.minimum is not None or rule.maximum is not None):
        meaning += f" {range_text(rule).capitalize()}."
    return f"\n| {flags} | `{variable_of(name)}` | {shown} | {meaning.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    print(options_page(), end="")
