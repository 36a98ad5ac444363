"""Settings for people: what is in force, and what there is to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tss.config.keys import SETTINGS, Setting
from tss.config.models import Config

KINDS: dict[Any, str] = {
    bool: "`true`, `false`",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
}
LIMITS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def describe(config: Config) -> str:
    """Every setting in force, one a line, secrets hidden, with the default of those that were changed."""
    lines = []
    for setting in SETTINGS.values():
        value, default = setting.value(config), setting.field.default
        changed = value != default and setting.field.default_factory is None
        note = f"  (default: {setting.shown(default) or 'unset'})" if changed else ""
        lines.append(f"{setting.name:<40} {setting.shown(value) or 'unset'}{note}")
    return "\n".join(lines)


def table() -> str:
    """Every setting as a Markdown table."""
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for setting in SETTINGS.values():
        field = setting.field
        default = "" if field.default_factory else setting.shown(field.default)
        cells = (
            f"`{setting.name}`",
            f"`{default}`" if default else "",
            _values(setting),
            field.description or "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _values(setting: Setting) -> str:
    """Which values a setting takes, in a few words."""
    field = setting.field
    if setting.secret:
        return "secret"
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    kind = next((part for part in get_args(field.annotation) if part is not type(None)), field.annotation)
    limits = [
        f"{word} {getattr(bound, name):.12g}"
        for name, word in LIMITS.items()
        for bound in field.metadata
        if hasattr(bound, name)
    ]
    return " ".join([KINDS[kind], *limits])
