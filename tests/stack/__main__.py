"""`bin/stack`: the real parts, by hand."""

from __future__ import annotations

import argparse
import sys

from tests.stack.install import InstallError, build, fetch, install, say
from tests.stack.stack import BUCKET, METRICS_ADDRESS, S3_KEY_ID, S3_SECRET, Stack, StackError

COMMANDS = {
    "up": "install what is missing, start everything, print where it is",
    "down": "end every process and remove the data",
    "status": "what runs, and whether it serves; exit code 1 when something does not",
    "env": 'only the export lines for a worker: eval "$(bin/stack env)"',
    "install": "only install, for a CI cache: fetch, then build",
    "fetch": "packages and jars, a minute or two",
    "build": "MinIO and telemetrygen, from source: some minutes, which tests that need neither may use",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bin/stack",
        description="Kafka, Redis, MinIO, an Iceberg REST catalog and Prometheus on free loopback ports.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    command = parser.parse_args().command
    try:
        stacks = Stack.known()
        match command:
            case "up":
                install()
                return _up(stacks)
            case "down":
                return _down(stacks)
            case "status":
                return _status(stacks)
            case "env":
                return _env(stacks)
            case "fetch":
                fetch()
                return 0
            case "build":
                build()
                return 0
            case _:
                install()
                return 0
    except (InstallError, StackError) as error:
        say(f"bin/stack: {error}")
        return 1


def _up(stacks: list[Stack]) -> int:
    ours = []
    for known in stacks:
        if known.owner is None:
            ours.append(known)
        else:
            say(f"ending what a killed test run left in {known.folder}")
            known.down()
    stack = ours[-1] if ours else Stack.new()
    stack.up()
    print(_table(stack))
    print(f"MinIO: bucket {BUCKET}, key {S3_KEY_ID}, secret {S3_SECRET}")
    print(f"Prometheus scrapes {METRICS_ADDRESS} (other addresses: edit prometheus/targets.json there)")
    print('For a worker in this shell, also with eval "$(bin/stack env)":\n')
    print(_exports(stack))
    return 0


def _down(stacks: list[Stack]) -> int:
    if not stacks:
        say("nothing runs")
    for stack in stacks:
        names = [part.name for part in stack.parts if part.pid is not None]
        stack.down()
        say(f"ended: {', '.join(names) or 'nothing was left running'}")
    return 0


def _status(stacks: list[Stack]) -> int:
    if not stacks:
        print("nothing runs; bin/stack up starts it")
        return 1
    for stack in stacks:
        print(_table(stack))
    return 0 if all(part.serves() for stack in stacks for part in stack.parts) else 1


def _env(stacks: list[Stack]) -> int:
    if not stacks:
        say("nothing runs; bin/stack up starts it")
        return 1
    print(_exports(stacks[-1]))
    return 0


def _table(stack: Stack) -> str:
    rows = [("PART", "ADDRESS", "PID", "STATE")]
    for part in stack.parts:
        state = "serves" if part.serves() else "down" if part.pid is None else "does not serve"
        rows.append((part.name, part.url, str(part.pid or "-"), state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), f"Data and logs: {stack.folder}/<part>"])


def _exports(stack: Stack) -> str:
    return "\n".join(f"export {name}={value}" for name, value in stack.environment().items())


if __name__ == "__main__":
    sys.exit(main())
