"""Reading the settings, in four steps none of which stops the next, so that all faults are told together.

Find every (key, text, place); accept the known ones; let pydantic build the models, with the default in place of
what it refuses; look for clashes. What a file says is kept as text until pydantic sees it, as a variable is, so
`password: 0123` means the four characters one sees, and both follow the same rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

import tss
from tss.config.clashes import clashes
from tss.config.keys import RENAMED, REPLACED, SECTIONS, SETTINGS, Key
from tss.config.models import PREFIX, Config
from tss.errors import ConfigError

FILE_VARIABLE = "TSS_CONFIG"


@dataclass(frozen=True, slots=True)
class Found:
    """A value as somebody wrote it, and where: the variable, or file and line."""

    key: Key
    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing the operator has to change."""

    name: str
    place: str
    fix: str
    saw: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.place}): {f'saw {self.saw!r}; ' if self.saw else ''}{self.fix}"


def load(environ: Mapping[str, str]) -> Config:
    """Settings from `environ` and the file it names; ConfigError with every fault when they cannot work."""
    faults: list[Fault] = []
    given = _accept(_in_file(environ.get(FILE_VARIABLE, ""), faults), faults)
    given |= _accept(_in_environment(environ, faults), faults)
    config, invalid = _build(given)
    faults += invalid
    if not any(fault.name == FILE_VARIABLE for fault in faults):
        faults += _clashes(config, given, faults)
    if faults:
        count = "1 setting" if len(faults) == 1 else f"{len(faults)} settings"
        raise ConfigError("\n  ".join([f"{count} cannot work:", *map(str, faults)]))
    return config


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a child process that finds this package, without our settings: there are secrets among them."""
    others = {name: text for name, text in environ.items() if not name.upper().startswith(PREFIX)}
    return others | {"PYTHONPATH": str(Path(tss.__file__).parent.parent)}


def _in_environment(environ: Mapping[str, str], faults: list[Fault]) -> Iterator[Found]:
    for variable, text in sorted(environ.items()):
        name = variable.upper()
        if name.startswith(PREFIX):
            yield Found(tuple(name[len(PREFIX) :].lower().split("__")), text, variable)
        elif name.startswith("TSS_") and (key := tuple(name[len("TSS_") :].lower().split("__"))) in SETTINGS:
            faults.append(
                Fault(".".join(key), variable, f"write it with two underscores: {SETTINGS[key].variable}")
            )


def _in_file(file: str, faults: list[Fault]) -> Iterator[Found]:
    """Every scalar of the YAML `file` under the keys that lead to it; a file without any is fine."""
    if not file:
        return
    try:
        root = yaml.compose(Path(file).read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        faults.append(
            Fault(
                FILE_VARIABLE, file, f"cannot be read: {error.strerror}; name a YAML file that can, or none"
            )
        )
    except UnicodeDecodeError as error:
        faults.append(Fault(FILE_VARIABLE, file, f"is not UTF-8 text: byte {error.start}"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        faults.append(
            Fault(FILE_VARIABLE, f"{file}:{mark.line + 1}" if mark else file, f"is not YAML: {problem}")
        )
    else:
        if isinstance(root, yaml.MappingNode):
            yield from _below(root, (), file, faults)
        elif root is not None:
            faults.append(
                Fault(FILE_VARIABLE, f"{file}:1", "must hold sections, such as `kafka:` with keys below it")
            )


def _below(section: yaml.MappingNode, above: Key, file: str, faults: list[Fault]) -> Iterator[Found]:
    # Only known sections are entered, so an alias that contains itself ends as an unknown key.
    for name, node in section.value:
        key, place = (*above, str(name.value).lower()), f"{file}:{name.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode) and key in SECTIONS:
            yield from _below(node, key, file, faults)
        elif isinstance(node, yaml.ScalarNode):
            yield Found(key, "" if node.tag == "tag:yaml.org,2002:null" else node.value, place)
        elif key in SETTINGS:
            faults.append(Fault(".".join(key), place, "takes one value, not a list or a section"))
        else:
            yield Found(key, "…", place)


def _accept(found: Iterable[Found], faults: list[Fault]) -> dict[Key, Found]:
    """What names a known setting, by its key; a secret's file is read. Everything else becomes a fault."""
    accepted: dict[Key, Found] = {}
    for item in found:
        key = RENAMED.get(item.key, item.key)
        if item.text == "" and (key in SETTINGS or key in SECTIONS):
            continue
        secret = SETTINGS.get((*key[:-1], key[-1].removesuffix("_file")))
        if key not in SETTINGS and secret is not None and secret.secret:
            content = _secret_in(item, faults)
            if content is None:
                continue
            key, item = secret.key, Found(secret.key, content, item.place)
        if key not in SETTINGS:
            faults.append(Fault(".".join(item.key), item.place, _unknown(item.key)))
        elif key in accepted:
            faults.append(
                Fault(".".join(key), item.place, f"is also given by {accepted[key].place}; keep one of them")
            )
        else:
            accepted[key] = item
    return accepted


def _secret_in(item: Found, faults: list[Fault]) -> str | None:
    try:
        content = Path(item.text).read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        faults.append(
            Fault(
                ".".join(item.key),
                item.place,
                f"cannot be read: {reason}; name a file that holds the secret",
                item.text,
            )
        )
        return None
    if not content:
        faults.append(Fault(".".join(item.key), item.place, "is empty; put the secret into it", item.text))
        return None
    return content


def _unknown(key: Key) -> str:
    for depth in range(len(key), 0, -1):
        if key[:depth] in REPLACED:
            return f"has no meaning here; instead: {REPLACED[key[:depth]]}"
    if key in SECTIONS:
        inside = next(setting for setting in SETTINGS.values() if setting.key[: len(key)] == key)
        return f"is a section and takes no value; set its keys, such as {inside.name} ({inside.variable})"
    names = {setting.name: setting for setting in SETTINGS.values()}
    nearest = names[difflib.get_close_matches(".".join(key), names, n=1, cutoff=0)[0]]
    return f"is unknown; the nearest known setting is {nearest.name} ({nearest.variable})"


def _build(given: Mapping[Key, Found]) -> tuple[Config, list[Fault]]:
    """The models, with the default in place of every value that was refused."""
    try:
        return _validated(given), []
    except ValidationError as error:
        refused = {tuple(map(str, detail["loc"])): _wanted(detail) for detail in error.errors()}
    faults = [
        Fault(
            SETTINGS[key].name,
            given[key].place,
            f"must be {wanted} (default: {SETTINGS[key].shown(SETTINGS[key].field.default) or 'unset'})",
            SETTINGS[key].shown(given[key].text),
        )
        for key, wanted in refused.items()
    ]
    return _validated({key: found for key, found in given.items() if key not in refused}), faults


def _validated(given: Mapping[Key, Found]) -> Config:
    source = EnvSettingsSource(Config)
    source.env_vars = {SETTINGS[key].variable.lower(): found.text for key, found in given.items()}
    return Config.model_validate(source())


def _clashes(config: Config, given: Mapping[Key, Found], faults: list[Fault]) -> Iterator[Fault]:
    """A clash is told only when every setting it names is fine by itself."""
    at_fault = {fault.name for fault in faults}
    for name, fix in clashes(config):
        if name not in at_fault and not any(other in fix for other in at_fault):
            setting = SETTINGS[tuple(name.split("."))]
            place = given[setting.key].place if setting.key in given else setting.variable
            yield Fault(name, place, fix, setting.shown(setting.value(config)))


def _wanted(error: ErrorDetails) -> str:
    bounds = error.get("ctx", {})
    match error["type"]:
        case "int_parsing" | "int_from_float" | "int_type":
            return "a whole number"
        case "float_parsing" | "finite_number" | "float_type":
            return "a number"
        case "bool_parsing" | "bool_type":
            return "true or false"
        case "greater_than_equal":
            return f"at least {bounds['ge']:.12g}"
        case "greater_than":
            return f"more than {bounds['gt']:.12g}"
        case "less_than_equal":
            return f"at most {bounds['le']:.12g}"
        case "literal_error":
            return str(bounds["expected"])
        case "string_too_long":
            return f"at most {bounds['max_length']} characters long"
        case _:
            return f"something else: {error['msg']}"
