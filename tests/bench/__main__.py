"""python -m tests.bench decode: what parts of tss cost on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

from tests.bench import decode

RUNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What parts of tss cost.")
    parser.add_argument("part", choices=["decode"])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"runs of each figure (default: {RUNS})")
    options = parser.parse_args()
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("numba", "llvmlite", "numpy", "protobuf")
    )
    print(
        f"{_processor()}; {platform.system()} {platform.release()}; Python {platform.python_version()}; {versions}"
    )
    decode.main(options.runs)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
