"""A small HTTP forwarder in front of the Iceberg REST catalog: loses answers, hangs, and replays Lakekeeper.

Lakekeeper is the catalog that most users run; it cannot be installed from a package registry. What it puts on the
wire and the plain adapter does not, is replayed here as version 0.13.3 sends it: everything under `/catalog`, a
prefix per warehouse, a `uri` override made from the Host header, and S3 settings in every answer about a table
that win over the client's own.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from tests.ports import LOOPBACK

UPSTREAM_SECS = 30
OURS_TO_SET = {"host", "connection", "content-length", "accept-encoding", "transfer-encoding"}


@dataclass(frozen=True)
class Request:
    """What a client sent; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What becomes of one request. The default is the worst: it is done, and the client is told that it is not."""

    answer: int | None = 503
    """Status of an error sent instead of the catalog's answer; None closes the connection without a word."""
    hold_secs: float = 0
    """The client waits so long for it."""
    lands: Literal["before", "after", "never"] = "before"
    """When the catalog gets the request, seen from the hold; `after` is a commit that lands once all gave it up."""


@dataclass(frozen=True)
class Lakekeeper:
    """How the replayed Lakekeeper is set up."""

    s3_endpoint: str
    """As the warehouse knows it, and so as clients are told, whether they can reach it or not."""
    warehouse: str = "traces"
    project_id: str = "00000000-0000-0000-0000-000000000000"
    prefix: str = "0199d2f4-6c1e-7d3a-9a52-4f0c6a1be001"
    region: str = "us-east-1"
    base_uri: str | None = None
    """LAKEKEEPER__BASE_URI, which clients follow; None makes it from the Host header."""
    remote_signing: bool = False
    """The server's default: without `client-managed` access, clients are told to have requests signed by it."""


def is_commit(request: Request) -> bool:
    """Whether the request changes one existing table (or ends its staged creation)."""
    return request.method == "POST" and bool(re.search(r"/namespaces/[^/]+/tables/[^/?]+$", request.path))


class RestProxy:
    """Serves at `url` while the block lasts; `requests` is what came so far, oldest first."""

    def __init__(self, upstream: str, *, lakekeeper: Lakekeeper | None = None) -> None:
        """`upstream` is the URL of the plain catalog."""
        self.requests: list[Request] = []
        self._upstream = urllib.parse.urlsplit(upstream)
        self._lakekeeper = lakekeeper
        self._faults: list[tuple[Callable[[Request], bool], Fault]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer((LOOPBACK, 0), _handler(self._serve))
        self._thread = threading.Thread(target=self._server.serve_forever, name="rest-proxy")
        self.url = f"http://{LOOPBACK}:{self._server.server_port}" + ("/catalog" if lakekeeper else "")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()  # ends every hold
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail_next(self, *faults: Fault, when: Callable[[Request], bool] = is_commit) -> None:
        """Each of the next requests that `when` picks meets one of the faults, in this order."""
        with self._lock:
            self._faults += [(when, fault) for fault in faults]

    @property
    def failing(self) -> int:
        """How many faults still wait for a request."""
        return len(self._faults)

    def mend(self) -> None:
        """Forgets the faults that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def _serve(self, request: Request) -> Answer | None:
        with self._lock:
            self.requests.append(request)
            fault = self._take_fault(request)
        if fault is None:
            return self._answer(request)
        if fault.lands == "before":
            self._answer(request)
        self._closing.wait(fault.hold_secs)
        if fault.lands == "after":
            self._answer(request)
        return None if fault.answer is None else _error(fault.answer, "InternalServerError", "injected fault")

    def _take_fault(self, request: Request) -> Fault | None:
        for place, (when, fault) in enumerate(self._faults):
            if when(request):
                del self._faults[place]
                return fault
        return None

    def _answer(self, request: Request) -> Answer | None:
        if self._lakekeeper is None:
            return self._forward(request, request.path)
        return self._answer_as(self._lakekeeper, request)

    def _answer_as(self, lakekeeper: Lakekeeper, request: Request) -> Answer | None:
        path, _, query = request.path.partition("?")
        if request.headers.get("x-project-id", lakekeeper.project_id) != lakekeeper.project_id:
            return _error(404, "ProjectNotFound", "no such project")
        if path == "/catalog/v1/config":
            if urllib.parse.parse_qs(query).get("warehouse") != [lakekeeper.warehouse]:
                return _error(404, "WarehouseNotFound", "no such warehouse")
            return _json(_config(lakekeeper, request))
        base = f"/catalog/v1/{lakekeeper.prefix}/"
        if not path.startswith(base):
            return _error(404, "NotFound", f"not under {base}")
        answer = self._forward(request, "/v1/" + request.path.removeprefix(base))
        if answer is None or answer.status != 200 or not _answers_with_table(request.method, path):
            return answer
        return _json({**json.loads(answer.body), "config": _table_config(lakekeeper, request, base)})

    def _forward(self, request: Request, path: str) -> Answer | None:
        """The catalog's own answer; None when it gives none."""
        headers = {name: value for name, value in request.headers.items() if name not in OURS_TO_SET}
        connection = http.client.HTTPConnection(
            self._upstream.hostname or LOOPBACK, self._upstream.port, timeout=UPSTREAM_SECS
        )
        try:
            connection.request(request.method, path, request.body or None, headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def _config(lakekeeper: Lakekeeper, request: Request) -> dict[str, Any]:
    return {
        "defaults": {"prefix": lakekeeper.prefix, "rest-page-size": "100"},
        "overrides": {"uri": lakekeeper.base_uri or f"http://{request.headers['host']}/catalog"},
    }


def _answers_with_table(method: str, path: str) -> bool:
    """Loading and creating do; a commit answers with metadata only."""
    one_table = re.search(r"/namespaces/[^/]+/tables/[^/]+$", path)
    all_tables = re.search(r"/namespaces/[^/]+/tables$", path)
    return bool((method == "GET" and one_table) or (method == "POST" and all_tables))


def _table_config(lakekeeper: Lakekeeper, request: Request, base: str) -> dict[str, str]:
    """Never the keys of the warehouse: with neither STS nor signing the client must have its own."""
    config = {
        "s3.endpoint": lakekeeper.s3_endpoint.rstrip("/") + "/",
        "s3.region": lakekeeper.region,
        "client.region": lakekeeper.region,
        "s3.path-style-access": "true",
    }
    if lakekeeper.remote_signing and request.headers.get("x-iceberg-access-delegation") != "client-managed":
        config |= {
            "py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO",
            "s3.remote-signing-enabled": "true",
            "s3.signer": "S3V4RestSigner",
            "s3.signer.uri": f"http://{request.headers['host']}/catalog",
            "s3.signer.endpoint": f"{base.removeprefix('/catalog/')}aws/s3/sign",
        }
    return config


def _json(body: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(body).encode())


def _error(status: int, kind: str, message: str) -> Answer:
    return Answer(status, json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode())


def _handler(serve: Callable[[Request], Answer | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = serve(Request(self.command, self.path, headers, body))
            if answer is None:
                self.close_connection = True
                return
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
            except ConnectionError:
                pass  # the client has given up, as clients of a held request do

        do_GET = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815  (http.server looks for these)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
