"""docs/options.md, made from ``settings``: ``python -m lowbit.settings_docs > docs/options.md``."""

from __future__ import annotations

from lowbit.commands.sglang_flags import ONLY_ONE, REFUSED, WITHOUT_EFFECT
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
for SGLang works unchanged, these flags:
"""


def options_page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n\n| Flag | Variable | Default | Meaning |\n| --- | --- | --- | --- |")
        parts[-1] += "".join(_row(name) for name, rule in Settings.options().items() if rule.group == group)
        parts[-1] += "\n"
    parts.append(_SGLANG)
    reasons: dict[str, list[str]] = {}
    for flag, (_, reason) in WITHOUT_EFFECT.items():
        reasons.setdefault(reason, []).append(f"`{flag}`")
    lines = ["Accepted, without effect:\n", *(f"- {', '.join(f)}: {reason}" for reason, f in reasons.items())]
    lines.append(f"\nAccepted with the value 1 only: {', '.join(f'`{flag}`' for flag in ONLY_ONE)}.")
    lines.append(f"\nRefused: {', '.join(f'`{flag}`' for flag in REFUSED)}.\n")
    return "\n".join([*parts, "\n".join(lines)])


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
