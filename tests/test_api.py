"""The HTTP face over a real server socket: routes, codes and bodies as the documentation promises them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import aiohttp
import pytest

from tests.stack import Part
from tss import __version__
from tss.api import Check, Queries, Rules, Status, make_app, serve
from tss.config import Api, App, Config, Observability
from tss.config import Redis as RedisConfig
from tss.errors import BadRequest, ConfigError, Unavailable
from tss.query import QueryResult
from tss.rule_store import RuleStore
from tss.rules import ForceRule

LOOPBACK = "127.0.0.1"
JSON = {"Content-Type": "application/json"}
DEMO_RULE = {
    "description": "Force sample all demo-service traces",
    "duration_secs": 300,
    "priority": 100,
    "match": {"resource": [{"key": "service.name", "op": "eq", "value": "demo-service"}]},
    "action": "force_keep",
}


class Table:
    """Queries that answer with what they were asked."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.fault = fault

    async def run(self, sql: str) -> QueryResult:
        self.asked.append(sql)
        if self.fault:
            raise self.fault
        columns = [{"name": "n", "type": "int64"}]
        return QueryResult(columns, b'[{"n":9223372036854775807}]', 1, False, 1.5)


class Memory:
    """Rules in a dict, with a place to put a fault and one to see which thread asked."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.rules: dict[str, ForceRule] = {}
        self.fault = fault
        self.threads: set[int] = set()

    def _touch(self) -> None:
        self.threads.add(threading.get_ident())
        if self.fault:
            raise self.fault

    def add(self, rule: ForceRule) -> None:
        self._touch()
        if rule.id in self.rules:
            raise BadRequest(f"there is a rule {rule.id!r} already", status=409)
        self.rules[rule.id] = rule

    def get(self, rule_id: str) -> ForceRule | None:
        self._touch()
        return self.rules.get(rule_id)

    def list(self) -> tuple[ForceRule, ...]:
        self._touch()
        return tuple(self.rules.values())

    def delete(self, rule_id: str) -> bool:
        self._touch()
        return self.rules.pop(rule_id, None) is not None

    def extend(self, rule_id: str, duration_secs: float, now: datetime) -> ForceRule | None:
        self._touch()
        if rule := self.rules.get(rule_id):
            self.rules[rule_id] = rule.extended(duration_secs, now)
        return self.rules.get(rule_id)

    def set_enabled(self, rule_id: str, enabled: bool) -> ForceRule | None:
        self._touch()
        if rule := self.rules.get(rule_id):
            self.rules[rule_id] = rule.model_copy(update={"enabled": enabled})
        return self.rules.get(rule_id)

    def cleanup(self, now: datetime) -> int:
        self._touch()
        return sum(self.delete(rule.id) for rule in self.list() if rule.expired(now))


GOOD = Status(True, False, (Check("Redis", True, "answers", "redis.url", 0.5),), {"pending_traces": 3})


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def __call__(
        self, method: str, path: str, **options: Any
    ) -> tuple[int, Any, aiohttp.ClientResponse]:
        async with self.session.request(method, self.url + path, **options) as response:
            text = await response.text()
            body: Any = json.loads(text) if "json" in response.content_type else text
            if response.status >= 400:
                assert response.content_type == "application/problem+json", text
                assert body["status"] == response.status
                assert body["title"]
                assert body["detail"]
            return response.status, body, response


@asynccontextmanager
async def api(
    *,
    rules: Rules | None = None,
    queries: Queries | None = None,
    status: Callable[[], Status] = lambda: GOOD,
    address: str = LOOPBACK,
    **settings: Any,
) -> AsyncIterator[Client]:
    config = Config(
        app=App(instance_id="worker-1"),
        api=Api(**settings),
        observability=Observability(health_addr=address),
    )
    app = make_app(config, rules or Memory(), queries or Table(), status)
    runner, port = await serve(app, LOOPBACK, 0)
    try:
        async with aiohttp.ClientSession() as session:
            yield Client(session, f"http://{LOOPBACK}:{port}")
    finally:
        await runner.cleanup()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_health_of_a_ready_process() -> None:
    """A ready process is alive, ready and healthy, and shows checks with ages and its pipeline."""

    async def check() -> None:
        async with api() as call:
            assert (await call("GET", "/health/live"))[0] == 200
            assert (await call("GET", "/health/ready"))[:2] == (200, {"status": "ready"})
            code, body, response = await call("GET", "/health")
            assert code == 200
            assert body["status"] == "healthy"
            assert body["version"] == __version__
            assert body["instance_id"] == "worker-1"
            assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None
            assert body["checks"] == [
                {"name": "Redis", "ok": True, "detail": "answers", "setting": "redis.url", "age_secs": 0.5}
            ]
            assert body["pipeline"] == {"pending_traces": 3}
            assert response.headers["Cache-Control"] == "no-store"

    run(check())


def test_health_of_a_process_that_waits() -> None:
    """A process that waits says for what and where to look, with 503 on ready only."""
    checks = (*GOOD.checks, Check("Kafka", False, "connection refused", "kafka.brokers", None))

    async def check() -> None:
        async with api(status=lambda: Status(False, False, checks, {})) as call:
            code, body, _ = await call("GET", "/health/ready")
            assert code == 503
            assert body["detail"] == "waiting for Kafka (kafka.brokers): connection refused"
            assert [c["name"] for c in body["waiting_for"]] == ["Kafka"]
            code, body, _ = await call("GET", "/health")
            assert (code, body["status"]) == (200, "unhealthy")
            assert (await call("GET", "/health/live"))[0] == 200
        async with api(status=lambda: Status(True, True, GOOD.checks, {})) as call:
            code, body, _ = await call("GET", "/health/ready")
            assert (code, body["detail"]) == (503, "shutting down")

    run(check())


def test_force_rules_from_making_to_deleting() -> None:
    """A rule is made with 201, shown in words, extended, switched, listed and deleted; then it is 404."""

    async def check() -> None:
        async with api() as call:
            code, body, response = await call("POST", "/admin/force-rules", json=DEMO_RULE)
            assert code == 201
            assert (body["success"], body["error"]) == (True, None)
            made = body["data"]
            path = response.headers["Location"]
            assert path == f"/admin/force-rules/{made['id']}"
            assert made["state"] == "active"
            assert 'resource service.name is "demo-service"' in made["in_words"]
            assert {k: made[k] for k in ("description", "priority", "action")} == {
                k: DEMO_RULE[k] for k in ("description", "priority", "action")
            }
            _, body, _ = await call("PUT", f"{path}/extend", json={"duration_secs": 60})
            ends = [datetime.fromisoformat(rule["expires_at"]) for rule in (made, body["data"])]
            assert (ends[1] - ends[0]).total_seconds() == 60
            assert (await call("PUT", f"{path}/disable"))[1]["data"]["state"] == "disabled"
            assert (await call("PUT", f"{path}/enable"))[1]["data"]["state"] == "active"
            assert (await call("GET", path))[1]["data"]["id"] == made["id"]
            assert [r["id"] for r in (await call("GET", "/admin/force-rules"))[1]["data"]] == [made["id"]]
            assert (await call("POST", "/admin/force-rules/cleanup"))[1]["data"] == {"removed": 0}
            assert (await call("DELETE", path))[:2] == (
                200,
                {"success": True, "data": {"deleted": made["id"]}, "error": None},
            )
            for method, where in (
                ("GET", path),
                ("DELETE", path),
                ("PUT", f"{path}/enable"),
                ("PUT", f"{path}/disable"),
            ):
                assert (await call(method, where))[0] == 404
            assert (await call("PUT", f"{path}/extend", json={"duration_secs": 60}))[0] == 404

    run(check())


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "words"),
    [
        ("GET", "/nope", {}, 404, "GET / lists"),
        ("GET", "/admin/nope", {}, 404, "/admin/nope"),
        ("GET", "/admin/query", {}, 405, "POST"),
        ("POST", "/health", {}, 405, "GET"),
        ("POST", "/admin/query", {"data": b'{"sql": "SELECT 1"}'}, 415, "application/json"),
        ("POST", "/admin/query", {"data": {"sql": "SELECT 1"}}, 415, "form"),
        ("POST", "/admin/query", {"data": b"{", "headers": JSON}, 400, "not JSON"),
        ("POST", "/admin/query", {"data": b"\xff\xfe", "headers": JSON}, 400, "not JSON"),
        ("POST", "/admin/query", {"data": b"[" * 200_000, "headers": JSON}, 400, "deeply"),
        ("POST", "/admin/query", {"data": b'{"sql": NaN}', "headers": JSON}, 400, "NaN"),
        ("POST", "/admin/query", {"json": {"sql": 1}}, 400, "text"),
        ("POST", "/admin/query", {"json": ["SELECT 1"]}, 400, '"sql"'),
        ("POST", "/admin/query", {"json": {"sql": "SELECT 1", "limit": 5}}, 400, '"sql"'),
        ("POST", "/admin/query", {"json": {"sql": "x" * 400_000}}, 413, "api.max_body_bytes"),
        ("POST", "/admin/force-rules", {"json": {"action": "keep"}}, 422, "not valid"),
        ("PUT", "/admin/force-rules/x/extend", {"json": {"duration_secs": "5"}}, 422, "duration"),
        ("PUT", "/admin/force-rules/x/extend", {"json": {}}, 400, "duration_secs"),
        ("GET", "/admin/query/slowest-traces?limit=0", {}, 400, "limit"),
        ("GET", "/admin/query/error-traces?hours=x", {}, 400, "hours"),
        ("GET", "/admin/query/service-stats?since=1", {}, 400, "since"),
    ],
)
def test_faults_of_the_caller(
    method: str, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    """Every wrong request gets its own code and a problem that says what to change."""

    async def check() -> None:
        queries = Table()
        async with api(queries=queries, max_body_bytes=300_000) as call:
            code, body, response = await call(method, path, **options)
            assert (code, words in body["detail"]) == (status, True), body
            if status == 405:
                assert words in response.headers["Allow"]
        assert queries.asked == []

    run(check())


def test_a_refused_rule_points_at_its_faults() -> None:
    """A refused rule answers with pointers into the body, one for each fault."""
    bad = {**DEMO_RULE, "priority": -1, "match": {"span": [{"key": "a", "op": "eqq", "value": 1}]}}

    async def check() -> None:
        async with api() as call:
            code, body, _ = await call("POST", "/admin/force-rules", json=bad)
            assert code == 422
            assert {e["pointer"] for e in body["errors"]} == {"/priority", "/match/span/0/op"}
            assert any("did you mean 'eq'?" in e["detail"] for e in body["errors"])

    run(check())


def test_queries_answer_as_documented() -> None:
    """SQL and the ready-made queries answer with the documented object, integers exact."""

    async def check() -> None:
        queries = Table()
        async with api(queries=queries) as call:
            _, body, _ = await call("POST", "/admin/query", json={"sql": "SELECT 1"})
            assert body == {
                "success": True,
                "data": {
                    "columns": [{"name": "n", "type": "int64"}],
                    "rows": [{"n": 9223372036854775807}],
                    "row_count": 1,
                    "truncated": False,
                    "elapsed_ms": 1.5,
                },
                "error": None,
            }
            for name in ("slowest-traces", "error-traces", "service-stats"):
                assert (await call("GET", f"/admin/query/{name}?limit=7&hours=2"))[0] == 200
                assert "LIMIT 7" in queries.asked[-1]
        assert queries.asked[0] == "SELECT 1"
        assert len(queries.asked) == 4

    run(check())


def test_faults_of_the_parts_behind() -> None:
    """A part that is down is 503 with its setting; our own faults are 500 without their insides."""

    async def check() -> None:
        down = Unavailable("Redis", "redis.url", "connection refused")
        async with api(rules=Memory(down), queries=Table(ZeroDivisionError("secret inside"))) as call:
            code, body, _ = await call("GET", "/admin/force-rules")
            assert (code, body["part"], body["setting"]) == (503, "Redis", "redis.url")
            code, body, _ = await call("POST", "/admin/query", json={"sql": "SELECT 1"})
            assert code == 500
            assert "secret" not in str(body)
        async with api(queries=Table(BadRequest("stopped", status=408))) as call:
            assert (await call("POST", "/admin/query", json={"sql": "SELECT 1"}))[0] == 408
        async with api(queries=Table(BadRequest("too many", status=429))) as call:
            code, _, response = await call("POST", "/admin/query", json={"sql": "SELECT 1"})
            assert (code, response.headers["Retry-After"]) == (429, "1")

    run(check())


def test_blocking_parts_are_asked_in_threads() -> None:
    """The rule store, which blocks, is never called on the event loop's thread."""
    rules = Memory()

    async def check() -> None:
        async with api(rules=rules) as call:
            _, made, _ = await call("POST", "/admin/force-rules", json=DEMO_RULE)
            path = f"/admin/force-rules/{made['data']['id']}"
            for method, where in (("GET", path), ("PUT", f"{path}/disable"), ("GET", "/admin/force-rules")):
                await call(method, where)
            await call("PUT", f"{path}/extend", json={"duration_secs": 5})
            await call("POST", "/admin/force-rules/cleanup")
            await call("DELETE", path)

    run(check())
    assert rules.threads
    assert threading.get_ident() not in rules.threads


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.7", "worker.example"])
def test_off_loopback_admin_is_closed_without_a_token(address: str) -> None:
    """Reachable from elsewhere and without a token, admin is closed and names the settings that open it."""

    async def check() -> None:
        async with api(address=address) as call:
            for method, path in (
                ("GET", "/admin/force-rules"),
                ("POST", "/admin/query"),
                ("GET", "/admin/x"),
            ):
                code, body, _ = await call(method, path, json={"sql": "SELECT 1"})
                assert code == 403
                for setting in (
                    "TSS__API__TOKEN",
                    "TSS__OBSERVABILITY__HEALTH_ADDR",
                    "TSS__API__ALLOW_ANONYMOUS",
                ):
                    assert setting in body["detail"]
            assert (await call("GET", "/health"))[0] == 200
        async with api(address=address, allow_anonymous=True) as call:
            assert (await call("GET", "/admin/force-rules"))[0] == 200

    run(check())


@pytest.mark.parametrize("address", ["0.0.0.0", LOOPBACK])
def test_a_token_once_set_is_asked_for(address: str) -> None:
    """With a token only its bearer gets in, whatever the address; health stays open."""

    async def check() -> None:
        async with api(address=address, token="geheim-é") as call:
            wrong = [
                {},
                {"Authorization": "Bearer no"},
                {"Authorization": "Basic geheim"},
                {"Authorization": "Bearer"},
            ]
            for headers in wrong:
                code, body, response = await call("GET", "/admin/force-rules", headers=headers)
                assert code == 401
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert "geheim" not in str(body)
            for scheme in ("Bearer", "bearer"):
                headers = {"Authorization": f"{scheme} geheim-é"}
                assert (await call("GET", "/admin/force-rules", headers=headers))[0] == 200
            assert (await call("GET", "/health/live"))[0] == 200
            assert "Authorization: Bearer" in (await call("GET", "/"))[1]

    run(check())


def test_foreign_names_for_loopback_are_refused() -> None:
    """A page whose DNS name was pointed at loopback gets nothing; the local names do."""

    async def check() -> None:
        async with api() as call:
            for host, status in (
                ("evil.example", 403),
                ("localhost:1", 200),
                ("127.0.0.1", 200),
                ("[::1]:80", 200),
            ):
                assert (await call("GET", "/admin/force-rules", headers={"Host": host}))[0] == status

    run(check())


def test_first_page_shows_commands_that_work() -> None:
    """The first page's curl lines carry the address they were asked at; every GET among them answers."""

    async def check() -> None:
        async with api() as call:
            _, page, _ = await call("GET", "/")
            assert "{" + "url}" not in page
            commands = [
                line.split() for line in page.splitlines() if line.startswith("curl") and "-X" not in line
            ]
            paths = [
                word.strip("'").removeprefix(call.url)
                for line in commands
                for word in line
                if call.url in word
            ]
            assert len(paths) >= 8
            for path in paths:
                assert (await call("GET", path))[0] == (404 if path.endswith("/ID") else 200), path

    run(check())


def test_a_taken_port_names_the_setting() -> None:
    """When the port is taken, the error names the setting and the way out."""

    async def check() -> None:
        async with api() as call:
            app = make_app(Config(), Memory(), Table(), lambda: GOOD)
            with pytest.raises(ConfigError, match="health_port"):
                await serve(app, LOOPBACK, int(call.url.rpartition(":")[2]))

    run(check())


def test_hanging_up_cancels_the_query() -> None:
    """A caller that goes away cancels what it asked for."""
    cancelled = asyncio.Event()

    class Endless(Table):
        async def run(self, sql: str) -> QueryResult:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return await super().run(sql)

    async def check() -> None:
        async with api(queries=Endless()) as call:
            with pytest.raises(asyncio.TimeoutError):
                await call(
                    "POST", "/admin/query", json={"sql": "x"}, timeout=aiohttp.ClientTimeout(total=0.3)
                )
            await asyncio.wait_for(cancelled.wait(), 5)

    run(check())


def test_with_the_real_rule_store(redis_server: Part) -> None:
    """Rules made over HTTP are in Redis; a conflict is 409; with Redis down the answer is 503."""
    config = Config(redis=RedisConfig(url=redis_server.url, connection_timeout_secs=2))

    async def check() -> None:
        store = RuleStore(config)
        async with api(rules=store) as call:
            rule = {**DEMO_RULE, "id": "demo"}
            assert (await call("POST", "/admin/force-rules", json=rule))[0] == 201
            assert (await call("POST", "/admin/force-rules", json=rule))[0] == 409
            assert [r.id for r in store.refresh().rules] == ["demo"]
            with redis_server.down():
                code, body, _ = await call("GET", "/admin/force-rules")
                assert (code, body["setting"]) == (503, "redis.url")
        store.close()

    run(check())
