"""What the documents say is what the code does: routes, commands, metrics, reasons, steps.

`python -m tests.test_readme` prints docs/metrics.md. (tests/test_config.py compares the table of settings.)
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from aiohttp import web

from tss import api, buffer, cli, config, judge, rules, wire
from tss.metrics import Metrics
from tss.model import Trigger

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
METRICS = ROOT / "docs" / "metrics.md"
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text("utf-8")

# The commands that users of the published demo plan have in their notes, word for word.
PROMISED_COMMANDS = (
    """\
curl -X POST http://localhost:8080/admin/query -H "Content-Type: application/json" \\
  -d '{"sql": "SELECT trace_id, status_code, duration_ms FROM spans LIMIT 10"}'
""",
    """\
curl -X POST http://localhost:8080/admin/force-rules -H "Content-Type: application/json" -d '{
  "description": "Force sample all demo-service traces", "duration_secs": 300, "priority": 100,
  "match": {"resource": [{"key": "service.name", "op": "eq", "value": "demo-service"}]},
  "action": "force_keep"}'
curl http://localhost:8080/admin/force-rules | jq .
""",
    """\
curl -s -H "x-project-id: 00000000-0000-0000-0000-000000000000" \\
  http://localhost:8181/catalog/v1/<prefix>/namespaces/default/tables/spans | jq .
""",
    """\
curl http://localhost:8080/health/live
curl http://localhost:8080/health/ready
curl http://localhost:8080/health | jq .
""",
    'curl -s http://localhost:9090/metrics | grep -E "^tail_sampling"\n',
)


def metrics_page() -> str:
    """docs/metrics.md, from the help texts."""
    metrics = Metrics()
    # A metric that still is without values shows its labels only inside.
    labels = {getattr(m, "_name", ""): getattr(m, "_labelnames", ()) for m in vars(metrics).values()}
    rows = []
    for family in metrics.registry.collect():
        if family.name.startswith("tail_sampling"):
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            braces = f" {{{', '.join(labels[family.name])}}}" if labels[family.name] else ""
            rows.append(f"| `{family.name}{suffix}{braces}` | {family.type} | {family.documentation} |")
    head = (
        "# Metrics\n\n"
        "Served on `observability.metrics_port` (9090), `/metrics`, beside the usual `process_*` and `python_info`. "
        "Histograms\n"
        "have `_bucket`, `_sum` and `_count`. Metrics with labels appear with their first value. This page is the "
        "output of\n"
        "`python -m tests.test_readme`; a test compares them.\n\n"
        "| metric | type | meaning |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


class _Nothing:
    """Stands where routes are only listed."""

    def __getattr__(self, name: str) -> Any:
        return None


def routes() -> Iterator[tuple[str, str]]:
    nothing: Any = _Nothing()
    for route in api.make_app(config.load({}), nothing, nothing, nothing).router.routes():
        if route.method != "HEAD" and isinstance(route.resource, web.Resource):
            yield route.method, route.resource.canonical


def curl_lines() -> list[str]:
    """Every curl command of the README, on one line each."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", "")
    return [line for line in re.split(r"\n(?=\S)", shell) if line.startswith("curl ")]


def asked(line: str) -> tuple[str, str]:
    """Method and path of a curl command."""
    method = re.search(r"-X (\w+)", line)
    url = re.search(r"http://localhost:8080(/[^\s'\"?]*)", line)
    assert url, line
    return method[1] if method else "GET", re.sub(r"/ID\b", "/{id}", url[1])


def test_the_readme_shows_every_route() -> None:
    """Each route of the API, but for the index page, has a curl line, and no curl line asks for anything else."""
    shown = {asked(line) for line in curl_lines() if "localhost:8080" in line}
    assert shown == set(routes()) - {("GET", "/")}


@pytest.mark.parametrize("command", PROMISED_COMMANDS)
def test_promised_commands_stand_in_the_readme_word_for_word(command: str) -> None:
    """Commands that users already have are shown exactly so."""
    assert command in README


def test_the_readme_names_every_command() -> None:
    """Each `tss` command and each script in bin/ is shown."""
    commands = re.findall(r"^  (\w+)  ", cli.USAGE, re.MULTILINE)
    assert len(commands) == 4
    assert [c for c in commands if f"bin/tss {c}" not in README] == []
    scripts = [path.name for path in (ROOT / "bin").iterdir() if not path.name.startswith("_")]
    assert [name for name in scripts if f"bin/{name}" not in README] == []


def test_the_readme_explains_every_trigger_reason_and_operator() -> None:
    """What a decision row or a rule can say has a line in a table."""
    words = [trigger.label for trigger in Trigger]
    words += [*judge.REASONS_KEPT, judge.FORCE_DROP, judge.NOT_SAMPLED]
    cells = {
        name
        for row in re.findall(r"^\| (`[^|]*)\|", README, re.MULTILINE)
        for name in re.findall("`([^`]+)`", row)
    }
    assert set(words) - cells == set()
    assert set(get_args(rules.Op)) - cells == set()


def test_the_readme_names_every_reason_of_a_dead_letter() -> None:
    """Whoever finds a letter in the topic can look its reason up."""
    reasons = set(re.findall(r'"((?:bad|too|un|invalid)_?[a-z_]+)"', inspect.getsource(wire)))
    assert {"undecodable", "invalid_json", "bad_trace_id"} <= reasons
    assert [reason for reason in reasons if f"`{reason}`" not in README] == []


def test_metrics_in_the_readme_exist() -> None:
    """No document speaks of a metric that is not served."""
    served = set(re.findall(r"^\| `(tail_sampling_\w+)", metrics_page(), re.MULTILINE))
    series = served | {f"{name}_bucket" for name in served}
    named = set(re.findall(r"tail_sampling_\w+", README)) - {"tail_sampling_"}
    table = re.search(r"^\| metric `tail_sampling_…`.*?\n\n", README, re.DOTALL | re.MULTILINE)
    assert table
    first_cells = [row.split("|")[1] for row in table[0].splitlines()[2:] if row]
    named |= {f"tail_sampling_{name}" for cell in first_cells for name in re.findall(r"`([a-z_]+)", cell)}
    assert len(named) > 25
    assert named - series == set()


def test_the_metrics_page_is_complete() -> None:
    """docs/metrics.md has every metric with its type, labels and meaning."""
    assert METRICS.read_text("utf-8") == metrics_page(), (
        "write it again: .venv/bin/python -m tests.test_readme > docs/metrics.md"
    )


def test_links_lead_to_files() -> None:
    """Every relative link of the documents leads somewhere."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_steps_named_in_the_code_stand_in_the_protocol() -> None:
    """A comment that says "step 9" can be looked up, and each of the sixteen steps is named by some code."""
    steps = {int(number) for number in re.findall(r"^### (\d+)\. ", PROTOCOL, re.MULTILINE)}
    assert steps == set(range(1, 17))
    named: set[int] = set()
    for path in (ROOT / "tss").rglob("*.py"):
        for numbers in re.findall(r"\b[Ss]teps? (\d+(?:(?:, | and | to )\d+)*)", path.read_text("utf-8")):
            found = [int(number) for number in re.findall(r"\d+", numbers)]
            named |= set(range(found[0], found[-1] + 1)) if " to " in numbers else set(found)
    assert named == steps


def test_the_protocol_names_code_that_exists() -> None:
    """Functions, classes and scripts on the page are where it says, and rules and table agree in number."""
    modules = {path.stem for path in (ROOT / "tss").glob("*.py")}
    names = [name for name in re.findall(r"`(\w+(?:\.\w+)+)`", PROTOCOL) if name.split(".")[0] in modules]
    assert len(names) > 25
    for name in names:
        module, *path = name.split(".")
        found: Any = importlib.import_module(f"tss.{module}")
        for part in path:
            assert hasattr(found, part), name
            found = getattr(found, part)
    scripts = re.findall(r"script `([A-Z]+)`", PROTOCOL)
    assert len(scripts) >= 4
    assert [name for name in scripts if not isinstance(getattr(buffer, name), buffer.Script)] == []
    assert re.findall(r"^\| \*\*(R\d+)\*\*", PROTOCOL, re.MULTILINE) == [f"R{n}" for n in range(1, 13)]


def test_settings_named_in_the_documents_exist() -> None:
    """A dotted name of a setting, or its variable, is one that can be set."""
    known = {".".join(setting.key) for setting in config.keys.SETTINGS.values()}
    sections = {name.partition(".")[0] for name in known}
    for page in (README, PROTOCOL):
        dotted = re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", page)
        named = {name for name in dotted if name.split(".")[0] in sections and "(" not in name}
        assert {name for name in named if not name.endswith(".py")} - known == set()
        variables = {name.removesuffix("_FILE") for name in re.findall(r"TSS__\w+[A-Z]", page)} - {
            "TSS__SECTION__KEY"
        }
        assert {
            name for name in variables if name.removeprefix("TSS__").lower().replace("__", ".") not in known
        } == set()


if __name__ == "__main__":
    print(metrics_page(), end="")
