"""The HTTP face: health for machines, force rules and SQL for operators.

A success on /admin is `{success, data, error}` with a true status code; every fault anywhere is RFC 9457
`application/problem+json`. Handlers raise what `errors` defines and one middleware turns it into answers.

Who may use /admin: with `api.token` set, whoever sends it. Without one, anybody when the server listens on loopback
only (then the Host header must be a local name, or any web page could reach us by DNS rebinding) or when
`api.allow_anonymous` says so; else nobody. Bodies must be `application/json`, which no foreign page can send
without asking first.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Middleware

from tss import __version__
from tss.config import Config
from tss.errors import BadRequest, ConfigError, Unavailable
from tss.query import READY_MADE, QueryResult, Window
from tss.rules import ForceRule, check_duration, describe, new_rule

HANDLER_END_SECS = 5.0  # what open requests get when the server stops

logger = logging.getLogger("tss")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Check:
    """One thing this process depends on. `setting` is where to look when it is not ok."""

    name: str
    ok: bool
    detail: str
    setting: str
    age_secs: float | None


@dataclass(frozen=True)
class Status:
    """What this process knows about itself; cheap to make, it is asked for by every probe."""

    ready: bool
    draining: bool
    checks: tuple[Check, ...]
    pipeline: dict[str, Any]


class Rules(Protocol):
    """The rule store as the API uses it; every method may block."""

    def add(self, rule: ForceRule) -> None: ...
    def get(self, rule_id: str) -> ForceRule | None: ...
    def list(self) -> tuple[ForceRule, ...]: ...
    def delete(self, rule_id: str) -> bool: ...
    def extend(self, rule_id: str, duration_secs: float, now: datetime) -> ForceRule | None: ...
    def set_enabled(self, rule_id: str, enabled: bool) -> ForceRule | None: ...
    def cleanup(self, now: datetime) -> int: ...


class Queries(Protocol):
    async def run(self, sql: str) -> QueryResult: ...


def make_app(config: Config, rules: Rules, queries: Queries, status: Callable[[], Status]) -> web.Application:
    """The application with all routes; `serve` runs it."""
    app = web.Application(middlewares=[_problems, _guard(config)], client_max_size=config.api.max_body_bytes)
    force, ask, health = _ForceRules(rules), _Queries(queries), _Health(config, status)
    app.add_routes(
        [
            web.get("/", _index(config)),
            web.get("/health", health.full),
            web.get("/health/live", health.live),
            web.get("/health/ready", health.ready),
            web.get("/admin/force-rules", force.list),
            web.post("/admin/force-rules", force.create),
            web.post("/admin/force-rules/cleanup", force.cleanup),
            web.get("/admin/force-rules/{id}", force.get),
            web.delete("/admin/force-rules/{id}", force.delete),
            web.put("/admin/force-rules/{id}/extend", force.extend),
            web.put("/admin/force-rules/{id}/enable", force.enable),
            web.put("/admin/force-rules/{id}/disable", force.disable),
            web.post("/admin/query", ask.sql),
            *(web.get(f"/admin/query/{name}", ask.ready_made(name)) for name in READY_MADE),
        ]
    )
    return app


async def serve(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Listen; the runner to clean up and the port that was taken, which tells what port 0 became.

    The caller says that we listen, when its turn comes in the log of the start.
    """
    runner = web.AppRunner(
        app,
        access_log=None,  # probes every few seconds would bury everything else
        handler_cancellation=True,  # who hangs up cancels the query
        shutdown_timeout=HANDLER_END_SECS,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"observability.health_addr / health_port: cannot listen on {host}:{port} ({error.strerror}); "
            "choose another address or port (0 = any free one)"
        ) from None
    actual_port: int = runner.addresses[0][1]
    return runner, actual_port


# --- health ------------------------------------------------------------------------------------------------------


class _Health:
    def __init__(self, config: Config, status: Callable[[], Status]) -> None:
        self._config = config
        self._status = status

    async def full(self, _request: web.Request) -> web.Response:
        status = self._status()
        return _json(
            {
                "status": "healthy" if status.ready else "unhealthy",
                "ready": status.ready,
                "draining": status.draining,
                "timestamp": _now().isoformat().replace("+00:00", "Z"),
                "version": __version__,
                "instance_id": self._config.app.instance_id,
                "checks": [asdict(check) for check in status.checks],
                "pipeline": status.pipeline,
            }
        )

    async def live(self, _request: web.Request) -> web.Response:
        return _json({"status": "alive"})

    async def ready(self, _request: web.Request) -> web.Response:
        status = self._status()
        if status.ready and not status.draining:
            return _json({"status": "ready"})
        waiting = [check for check in status.checks if not check.ok]
        if status.draining:
            detail = "shutting down"
        elif waiting:
            detail = "waiting for " + "; ".join(f"{c.name} ({c.setting}): {c.detail}" for c in waiting)
        else:
            detail = "starting"
        return _problem(503, detail, {}, {"waiting_for": [asdict(check) for check in waiting]})


# --- force rules -------------------------------------------------------------------------------------------------


class _ForceRules:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    async def list(self, _request: web.Request) -> web.Response:
        now = _now()
        return _success([_shown(rule, now) for rule in await asyncio.to_thread(self._rules.list)])

    async def create(self, request: web.Request) -> web.Response:
        now = _now()
        rule = new_rule(await _body(request), rule_id=uuid.uuid4().hex, now=now)
        await asyncio.to_thread(self._rules.add, rule)
        logger.info("Force rule %s was made: %s", rule.id, describe(rule))
        location = {"Location": f"/admin/force-rules/{rule.id}"}
        return _success(_shown(rule, now), status=201, headers=location)

    async def get(self, request: web.Request) -> web.Response:
        rule_id = request.match_info["id"]
        return self._found(rule_id, await asyncio.to_thread(self._rules.get, rule_id))

    async def delete(self, request: web.Request) -> web.Response:
        rule_id = request.match_info["id"]
        if not await asyncio.to_thread(self._rules.delete, rule_id):
            return self._found(rule_id, None)
        logger.info("Force rule %s was deleted", rule_id)
        return _success({"deleted": rule_id})

    async def extend(self, request: web.Request) -> web.Response:
        rule_id = request.match_info["id"]
        duration_secs = check_duration(_only(await _body(request), "duration_secs"))
        rule = await asyncio.to_thread(self._rules.extend, rule_id, duration_secs, _now())
        return self._found(rule_id, rule)

    async def enable(self, request: web.Request) -> web.Response:
        return await self._switch(request, enabled=True)

    async def disable(self, request: web.Request) -> web.Response:
        return await self._switch(request, enabled=False)

    async def cleanup(self, _request: web.Request) -> web.Response:
        return _success({"removed": await asyncio.to_thread(self._rules.cleanup, _now())})

    async def _switch(self, request: web.Request, *, enabled: bool) -> web.Response:
        rule_id = request.match_info["id"]
        return self._found(rule_id, await asyncio.to_thread(self._rules.set_enabled, rule_id, enabled))

    def _found(self, rule_id: str, rule: ForceRule | None) -> web.Response:
        if rule is None:
            raise BadRequest(f"there is no force rule {rule_id[:64]!r}", status=404)
        return _success(_shown(rule, _now()))


def _shown(rule: ForceRule, now: datetime) -> dict[str, Any]:
    """A rule as the API shows it: its fields, whether it acts, and the whole in words."""
    state = "disabled" if not rule.enabled else "expired" if rule.expired(now) else "active"
    return {**rule.model_dump(mode="json"), "state": state, "in_words": describe(rule)}


# --- queries -----------------------------------------------------------------------------------------------------


class _Queries:
    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def sql(self, request: web.Request) -> web.Response:
        sql = _only(await _body(request), "sql")
        if not isinstance(sql, str):
            raise BadRequest("sql must be a text", errors=[{"pointer": "/sql", "detail": "must be a text"}])
        return _rows(await self._queries.run(sql))

    def ready_made(self, name: str) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            window = Window.parse(request.query, int(_now().timestamp() * 1000))
            return _rows(await self._queries.run(READY_MADE[name](window)))

        return handle


def _rows(result: QueryResult) -> web.Response:
    """The rows are JSON already and go into the answer as they are."""
    columns = json.dumps(result.columns, ensure_ascii=False).encode()
    rest = json.dumps(
        {"row_count": result.row_count, "truncated": result.truncated, "elapsed_ms": result.elapsed_ms}
    ).encode()
    data = b'{"columns": ' + columns + b', "rows": ' + result.rows_json + b", " + rest[1:]
    return web.Response(
        body=b'{"success": true, "data": ' + data + b', "error": null}\n', content_type="application/json"
    )


# --- in and out --------------------------------------------------------------------------------------------------


async def _body(request: web.Request) -> Any:
    """The request's JSON; BadRequest when it is none."""
    if request.content_type != "application/json":
        raise BadRequest(
            f"the body must be JSON: send Content-Type: application/json, not {request.content_type}",
            status=415,
        )
    try:
        return json.loads(await request.read(), parse_constant=_no_constant)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _only(body: object, key: str) -> Any:
    """The value of `key` in an object that has just this key."""
    if not isinstance(body, dict) or set(body) != {key}:
        raise BadRequest(f'the body must be an object with the one key "{key}"')
    return body[key]


def _json(data: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps(data, ensure_ascii=False) + "\n"
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


def _success(data: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return _json({"success": True, "data": data, "error": None}, status=status, headers=headers)


def _problem(
    status: int, detail: str, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
) -> web.Response:
    """RFC 9457; `type` is about:blank, so the title is the code's own phrase."""
    title = http.HTTPStatus(status).phrase
    problem = {"type": "about:blank", "title": title, "status": status, "detail": detail, **(more or {})}
    text = json.dumps(problem, ensure_ascii=False) + "\n"
    return web.Response(text=text, status=status, headers=headers, content_type="application/problem+json")


def _now() -> datetime:
    return datetime.now(UTC)


# --- around every request ----------------------------------------------------------------------------------------


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every fault as a problem; what nobody foresaw is logged and told without its insides."""
    try:
        response = await handler(request)
    except BadRequest as error:
        more = {"errors": error.errors} if error.errors else {}
        response = _problem(
            error.status, error.detail, {"Retry-After": "1"} if error.status == 429 else {}, more
        )
    except Unavailable as error:
        response = _problem(
            503, str(error), {"Retry-After": "1"}, {"part": error.part, "setting": error.setting}
        )
    except web.HTTPException as error:
        response = _http_problem(request, error)
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        response = _problem(500, "an error of the server's own; its log has the details")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "tss"
    return response


def _http_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    headers: dict[str, str] = {}
    match error:
        case web.HTTPNotFound():
            detail = f"there is nothing at {request.path[:200]}; GET / lists what there is"
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            headers["Allow"] = allowed
            detail = f"{request.path[:200]} takes {allowed}, not {error.method[:20]}"
        case web.HTTPRequestEntityTooLarge():
            detail = f"the body is too large: at most {request.client_max_size} bytes (api.max_body_bytes)"
        case _:
            detail = error.reason
    return _problem(error.status, detail, headers)


def _guard(config: Config) -> Middleware:
    """Asks for the token on /admin; the module's text says when."""
    api, address = config.api, config.observability.health_addr
    token = api.token.get_secret_value().encode() if api.token else b""
    loopback = _is_loopback(address)

    def admit(request: web.Request) -> None:
        if api.allow_anonymous:
            return
        if token:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token)
            if scheme.lower() != "bearer" or not right:
                raise BadRequest(
                    "this needs the token of api.token: Authorization: Bearer <token>", status=401
                )
        elif not loopback:
            raise BadRequest(
                f"the admin routes are closed, because observability.health_addr is {address} and there is no "
                "token; set api.token (TSS__API__TOKEN), or listen on 127.0.0.1 "
                "(TSS__OBSERVABILITY__HEALTH_ADDR), or open them to everyone who can connect with "
                "api.allow_anonymous=true (TSS__API__ALLOW_ANONYMOUS)",
                status=403,
            )
        elif not _is_local_name(request.host):
            raise BadRequest(
                f"without api.token only localhost is served, not {request.host[:100]!r}", status=403
            )

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/admin" or request.path.startswith("/admin/"):
            try:
                admit(request)
            except BadRequest as error:
                challenge = {"WWW-Authenticate": 'Bearer realm="tss"'} if error.status == 401 else None
                return _problem(error.status, error.detail, challenge)
        return await handler(request)

    return guard


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_local_name(host: str) -> bool:
    """True for localhost and IP addresses, with or without a port: names that no foreign DNS answers for."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True


# --- the first page ----------------------------------------------------------------------------------------------

_INDEX = """\
tss {version}

curl {url}/health | jq .
curl {url}/health/live
curl {url}/health/ready

curl {auth}-X POST {url}/admin/query -H 'Content-Type: application/json' \\
  -d '{{"sql": "SELECT trace_id, status_code, duration_ms FROM spans LIMIT 10"}}'
curl {auth}'{url}/admin/query/slowest-traces?limit=10&hours=24'
curl {auth}'{url}/admin/query/error-traces?limit=10&hours=24'
curl {auth}'{url}/admin/query/service-stats?limit=10&hours=24'

curl {auth}{url}/admin/force-rules
curl {auth}-X POST {url}/admin/force-rules -H 'Content-Type: application/json' -d '{{
  "description": "Keep everything of one service for five minutes", "duration_secs": 300, "priority": 100,
  "match": {{"resource": [{{"key": "service.name", "op": "eq", "value": "demo-service"}}]}},
  "action": "force_keep"}}'
curl {auth}{url}/admin/force-rules/ID
curl {auth}-X PUT {url}/admin/force-rules/ID/extend -H 'Content-Type: application/json' -d '{{"duration_secs": 300}}'
curl {auth}-X PUT {url}/admin/force-rules/ID/disable
curl {auth}-X PUT {url}/admin/force-rules/ID/enable
curl {auth}-X DELETE {url}/admin/force-rules/ID
curl {auth}-X POST {url}/admin/force-rules/cleanup
"""


def _index(config: Config) -> Handler:
    auth = '-H "Authorization: Bearer $TSS__API__TOKEN" ' if config.api.token else ""

    async def handle(request: web.Request) -> web.Response:
        url = f"{request.scheme}://{request.host}"
        return web.Response(text=_INDEX.format(version=__version__, url=url, auth=auth))

    return handle
