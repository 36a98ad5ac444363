"""The deployment files agree with the program, with each other, and with what users were promised."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.ports import LOOPBACK
from tss import __version__, bootstrap, config

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "prometheus.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = [name for name, service in SERVICES.items() if service.get("restart") == "no"]
LONG_RUNNING = [name for name in SERVICES if name not in ONE_SHOT]

# An exact release: at least two numbers, or a date; a digest may follow.
EXACT_TAG = re.compile(r":(v?\d+(\.\d+)+|RELEASE\.[\dTZ-]+)(@sha256:[0-9a-f]{64})?$")


def settings() -> config.Config:
    return config.load(SERVICES["tss"]["environment"])


# --- compose -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_images(name: str) -> None:
    """Every image is an exact version, and its own variable swaps it."""
    found = re.fullmatch(r"\$\{([A-Z]+)_IMAGE:-(\S+)\}", SERVICES[name]["image"])
    assert found, SERVICES[name]["image"]
    assert EXACT_TAG.search(found[2])
    assert name.upper().startswith(found[1]) or (name.startswith("init-") and found[1] == "TSS")


def test_own_image() -> None:
    """Compose runs this version, and the image's label says so."""
    assert SERVICES["tss"]["image"].endswith(f":-tss:{__version__}}}")
    assert f'org.opencontainers.image.version="{__version__}"' in DOCKERFILE


def test_settings() -> None:
    """Every TSS__ variable is a setting that exists, with the values of the published demo."""
    for name in ("tss", *(name for name in ONE_SHOT if name.startswith("init-"))):
        assert SERVICES[name]["environment"] == SERVICES["tss"]["environment"]
    known = settings()
    iceberg = known.storage.iceberg
    assert known.kafka.brokers == "kafka:29092"
    assert known.redis.url == "redis://redis:6379"
    assert known.storage.storage_type == "iceberg"
    assert iceberg.catalog_uri == "http://lakekeeper:8181/catalog"
    assert (iceberg.warehouse, iceberg.namespace, iceberg.table_name) == ("traces", "default", "spans")
    assert iceberg.project_id == "00000000-0000-0000-0000-000000000000"
    assert (iceberg.s3_endpoint, iceberg.s3_region, iceberg.s3_path_style) == (
        "http://minio:9000",
        "us-east-1",
        True,
    )
    minio = SERVICES["minio"]["environment"]
    assert iceberg.s3_access_key_id == minio["MINIO_ROOT_USER"] == "minioadmin"
    assert iceberg.s3_secret_access_key is not None
    assert iceberg.s3_secret_access_key.get_secret_value() == minio["MINIO_ROOT_PASSWORD"] == "minioadmin123"


def test_host_ports() -> None:
    """The host has the ports that users know, on loopback only, which is why no token is asked for."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "tss": ["127.0.0.1:8080:8080", "127.0.0.1:9090:9090"],
        "kafka": ["127.0.0.1:9092:9092"],
        "redis": ["127.0.0.1:6379:6379"],
        "minio": ["127.0.0.1:9000:9000", "127.0.0.1:9001:9001"],
        "lakekeeper": ["127.0.0.1:8181:8181"],
        "prometheus": ["127.0.0.1:9091:9090"],
    }
    assert settings().observability.health_port == 8080
    assert settings().observability.metrics_port == 9090
    assert settings().api.allow_anonymous


def test_kafka_addresses() -> None:
    """A client gets back an address that it can reach: one inside the network, another one from the host."""
    overrides = dict(
        argument.removeprefix("--override=").split("=", 1)
        for argument in SERVICES["kafka"]["command"]
        if argument.startswith("--override=")
    )
    assert (
        overrides["advertised.listeners"]
        == f"INTERNAL://{settings().kafka.brokers},EXTERNAL://localhost:9092"
    )
    names = [listener.split(":")[0] for listener in overrides["listeners"].split(",")]
    assert names == [pair.split(":")[0] for pair in overrides["listener.security.protocol.map"].split(",")]


@pytest.mark.parametrize("name", ONE_SHOT)
def test_one_shot_is_waited_for(name: str) -> None:
    """`up --wait` counts the end of a one-shot service as success only where another waits for that end."""
    conditions = {
        s["depends_on"][name]["condition"] for s in SERVICES.values() if name in s.get("depends_on", {})
    }
    assert conditions == {"service_completed_successfully"}


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_long_running_is_healthy_or_restarted(name: str) -> None:
    """Every other service says whether it works, comes back when it ends, and is waited for until it works."""
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert SERVICES[name]["restart"] == "unless-stopped"
    conditions = {
        s["depends_on"][name]["condition"] for s in SERVICES.values() if name in s.get("depends_on", {})
    }
    assert conditions <= {"service_healthy"}


def test_volumes_are_declared() -> None:
    """What holds data holds it in a named volume, so that `down` without -v keeps it."""
    used = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("./")
    }
    assert used == set(COMPOSE["volumes"])


def test_init_commands() -> None:
    """The init services are commands that `tss bootstrap` knows, and make every bucket that a part uses."""
    parser = argparse.ArgumentParser()
    bootstrap.add_arguments(parser)
    plans: dict[str, bootstrap.Plan] = {}
    for name in ONE_SHOT:
        if name.startswith("init-"):
            command, *rest = SERVICES[name]["command"]
            assert command == "bootstrap"
            (step,), plans[step] = bootstrap.plan_of(parser.parse_args(rest))
    assert set(plans) == set(bootstrap.STEPS)
    made = {plans["buckets"].bucket, *plans["buckets"].extra_buckets}
    kafka = set(re.findall(r"s3://([\w-]+)", " ".join(SERVICES["kafka"]["command"])))
    assert made == kafka | {plans["catalog"].bucket} == {"iceberg-warehouse", "automq-data", "automq-ops"}


def test_time_to_stop() -> None:
    """Docker waits longer than the worker may take to finish and leave."""
    seconds = int(SERVICES["tss"]["stop_grace_period"].removesuffix("s"))
    assert seconds > settings().app.shutdown_timeout_secs


@pytest.mark.parametrize("name", [name for name in SERVICES if "TSS_IMAGE" in SERVICES[name]["image"]])
def test_no_privileges(name: str) -> None:
    """Our containers have a read-only root and no capability."""
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_prometheus_target() -> None:
    """Prometheus reads the file of this folder, and it names the service and port where the metrics are."""
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in SERVICES["prometheus"]["volumes"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in PROMETHEUS["scrape_configs"]}
    assert targets["tss"] == [f"tss:{settings().observability.metrics_port}"]


# --- image -------------------------------------------------------------------------------------------------------


def test_base_image() -> None:
    """Both stages start from one exact Python that the package supports."""
    found = re.search(r"^ARG PYTHON=python:(\d+\.\d+\.\d+)-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found[1] in SpecifierSet(project["requires-python"])
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON}", "${PYTHON}"]


def test_build_context() -> None:
    """What the Dockerfile copies is there, and it is all that reaches the builder."""
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
    assert "*" in ignore
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_image_has_kernels() -> None:
    """Compiled from what is installed, not from the folder it was built in, and looked for as they were compiled."""
    build, image = re.findall(r"^ENV (NUMBA_.+)$", DOCKERFILE, re.MULTILINE)
    assert build == image
    assert "NUMBA_CPU_NAME=generic" in build
    assert re.search(r"/bin/python -P -m tss\.compiler$", DOCKERFILE, re.MULTILINE)


def test_image_runs_as() -> None:
    """The image runs `tss run` itself, without a shell between, under a number that is not root's."""
    assert re.search(r'^ENTRYPOINT \["tss"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r'^CMD \["run"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", DOCKERFILE, re.MULTILINE)


def image_healthcheck() -> list[str]:
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found
    command: list[str] = json.loads(found[1])
    return command


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (image_healthcheck(), "/health/live"),
        (SERVICES["tss"]["healthcheck"]["test"][1:], "/health/ready"),
    ],
)
@pytest.mark.parametrize("status", [200, 503])
def test_healthcheck(command: list[str], path: str, status: int) -> None:
    """The check passes exactly when its route says that all is well."""
    with answering(path, status) as port:
        python, option, code = command
        assert (python, option) == ("python", "-c")
        code = code.replace(":8080", f":{port}")
        environ = {"TSS__OBSERVABILITY__HEALTH_PORT": str(port)}
        done = subprocess.run([sys.executable, option, code], env=environ, capture_output=True)
    assert (done.returncode == 0) == (status == 200)


@contextmanager
def answering(path: str, status: int) -> Iterator[int]:
    """The port of a server that answers `status` at `path` and 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == path else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with HTTPServer((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
