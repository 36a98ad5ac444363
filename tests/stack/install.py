"""Gets the real parts onto this machine, once, into a cache outside the checkout.

    system        java, redis-server, prometheus, kcat: from apt when root, else a line that says what to run
    Maven         the jars of Kafka and of the Iceberg catalog, with our small server compiled against them
    Go            MinIO and telemetrygen, built at a pinned version (minutes for MinIO, hence the cache)

Everything is made in a scratch folder and moved into place whole, so an interrupted or a second install at the
same time leaves nothing half done. What a folder of jars is made from is in its name: an edited pom is a new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SAY_EVERY_SECS = 10

MINIO = ("github.com/minio/minio", "v0.0.0-20260212201848-7aac2a2c5b7c")
TELEMETRYGEN = (
    "github.com/open-telemetry/opentelemetry-collector-contrib/cmd/telemetrygen",
    "v0.161.0",
)

# Command on PATH -> package of Debian and Ubuntu, formula of Homebrew.
PACKAGES = {
    "redis-server": ("redis-server", "redis"),
    "prometheus": ("prometheus", "prometheus"),
    "kcat": ("kcat", "kcat"),
    "javac": ("default-jdk-headless", "openjdk@17"),
    "mvn": ("maven", "maven"),
    "go": ("golang-go", "go"),
}
OLDEST_JAVA = 17
OLDEST_REDIS = (7, 0)
OLDEST_GO = (1, 21)  # from here on Go fetches the newer toolchain that a module asks for


class InstallError(Exception):
    """A part cannot be had on this machine; the message says which, and what to do."""


@dataclass(frozen=True)
class Installed:
    """Where the parts are; those without a folder of ours are on PATH."""

    kafka: Path
    catalog: Path
    minio: Path
    telemetrygen: Path


def cache_dir() -> Path:
    """`$TSS_CACHE_DIR`, else `tss` in the user's cache folder."""
    if chosen := os.environ.get("TSS_CACHE_DIR"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tss"


def locate() -> Installed:
    """Where the parts are once they are installed."""
    cache = cache_dir() / "stack"
    kafka, catalog = HERE / "kafka", HERE / "catalog"
    return Installed(
        kafka=cache / _folder_name("kafka", kafka / "pom.xml"),
        catalog=cache / _folder_name("catalog", catalog / "pom.xml", catalog / "CatalogServer.java"),
        minio=cache / "bin" / "minio",
        telemetrygen=cache / "bin" / "telemetrygen",
    )


def install() -> Installed:
    """Installs what is missing; takes no time when nothing is."""
    fetch()
    build()
    return locate()


def fetch() -> None:
    """The first half of `install`: what is there in a minute or two."""
    parts = locate()
    parts.minio.parent.mkdir(parents=True, exist_ok=True)
    with_maven = not (parts.kafka.exists() and parts.catalog.exists())
    with_go = not (parts.minio.exists() and parts.telemetrygen.exists())
    _demand_commands(
        ["redis-server", "prometheus", "kcat", "javac", *["mvn"] * with_maven, *["go"] * with_go]
    )
    _demand_java()
    _demand_redis()
    if with_go:
        _demand_go()

    if not parts.kafka.exists():
        _install_jars(HERE / "kafka", parts.kafka)
    if not parts.catalog.exists():
        _install_jars(HERE / "catalog", parts.catalog)


def build() -> None:
    """The other half: MinIO alone keeps two cores busy for five minutes, which other work can share."""
    parts = locate()
    _install_go(parts.minio, *MINIO)
    _install_go(parts.telemetrygen, *TELEMETRYGEN)


def say(line: str) -> None:
    """Progress goes to stderr: stdout is for what a script reads."""
    print(line, file=sys.stderr, flush=True)


def _demand_commands(needed: list[str]) -> None:
    missing = [command for command in needed if not _works(command)]
    if missing and shutil.which("apt-get") and os.geteuid() == 0:
        packages = [PACKAGES[command][0] for command in missing]
        say(f"installing {', '.join(packages)} with apt-get")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run("apt-get update", ["apt-get", "update"], env=environment)
        _run(
            "apt-get install",
            ["apt-get", "install", "-y", "--no-install-recommends", *packages],
            env=environment,
        )
        missing = [command for command in needed if not _works(command)]
    if missing:
        apt = " ".join(PACKAGES[command][0] for command in missing)
        brew = " ".join(PACKAGES[command][1] for command in missing)
        raise InstallError(
            f"not on PATH: {', '.join(missing)}. Debian, Ubuntu: sudo apt-get install {apt}; macOS: brew install {brew}"
        )


def _works(command: str) -> bool:
    """Whether the command is there; macOS has a `javac` that only says that Java is missing."""
    if shutil.which(command) is None:
        return False
    return command != "javac" or subprocess.run([command, "-version"], capture_output=True).returncode == 0


def _demand_java() -> None:
    said = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    found = re.search(r'version "(\d+)', said)
    if found is None or int(found[1]) < OLDEST_JAVA:
        raise InstallError(
            f"Kafka needs Java {OLDEST_JAVA} or later; `java -version` says: {said.strip()}. "
            "Put a newer one first on PATH."
        )


def _demand_redis() -> None:
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_REDIS:
        raise InstallError(
            f"tss needs Redis 7.0 or later; `redis-server --version` says: {said.strip()}. "
            "Newer packages: https://redis.io/docs/latest/operate/oss_and_stack/install"
        )


def _demand_go() -> None:
    said = subprocess.run(["go", "version"], capture_output=True, text=True).stdout
    found = re.search(r"go(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_GO:
        raise InstallError(
            f"MinIO needs Go 1.21 or later to build; `go version` says: {said.strip()}. Newer: https://go.dev/dl"
        )


def _folder_name(part: str, *made_from: Path) -> str:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_from)).hexdigest()
    return f"{part}-{digest[:12]}"


def _install_jars(source: Path, target: Path) -> None:
    """The jars that `source/pom.xml` names, and the classes of the Java files beside it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        (made / "classes").mkdir(parents=True)
        _run(
            f"jars of {source.name}",
            [
                "mvn", "-B", "-q", "-ntp", "-f", source / "pom.xml", "dependency:copy-dependencies",
                "-DincludeScope=runtime", f"-DoutputDirectory={made / 'libs'}",
            ],
        )  # fmt: skip
        if java_files := sorted(source.glob("*.java")):
            _run(
                f"classes of {source.name}",
                ["javac", "-cp", f"{made / 'libs'}/*", "-d", made / "classes", *java_files],
            )
        _move_into_place(made, target)


def _install_go(target: Path, module: str, version: str) -> None:
    if target.exists() and _go_version_is(target, module, version):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        _run(
            f"{target.name} (built from source, some minutes)",
            ["go", "install", "-ldflags=-s -w", f"{module}@{version}"],
            env={**os.environ, "GOBIN": scratch, "CGO_ENABLED": "0"},
        )
        _move_into_place(Path(scratch) / target.name, target)


def _go_version_is(binary: Path, module: str, version: str) -> bool:
    """Go keeps the module's version in the binary; without a Go to ask, the cached one is believed."""
    if shutil.which("go") is None:
        return True
    said = subprocess.run(["go", "version", "-m", binary], capture_output=True, text=True).stdout
    return f"\tmod\t{module}\t{version}" in said


def _move_into_place(made: Path, target: Path) -> None:
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise
        # Another install at the same time was first, with the same content.


def _run(what: str, command: list[str | Path], *, env: dict[str, str] | None = None) -> None:
    """Runs a command, says now and then that it is still at it, shows its output only if it fails."""
    started = time.monotonic()
    say(f"  {what} …")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        try:
            while True:
                try:
                    code = process.wait(SAY_EVERY_SECS)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {what} … {time.monotonic() - started:.0f} s")
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code != 0:
            output.seek(0)
            tail = "\n".join(output.read().splitlines()[-15:])
            words = " ".join(str(word) for word in command)
            raise InstallError(f"{what}: `{words}` ended with {code}:\n{tail}")
    say(f"  {what}: done in {time.monotonic() - started:.0f} s")
