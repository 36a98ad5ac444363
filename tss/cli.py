"""The command line: `tss run | demo | check | bootstrap`."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from tss import __version__, config, logs
from tss.errors import ConfigError, TssError

log = logging.getLogger("tss")

USAGE = """\
commands:
  run         read spans, decide, write kept traces, answer queries (settings: TSS__SECTION__KEY, TSS_CONFIG)
  demo        everything in one command, nothing to install: see tail sampling at work
  check       say what is wrong with the settings; --connect also tries Kafka, Redis, catalog and object store
  bootstrap   make buckets, topics, warehouse and namespace where they are missing
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tss",
        description="Tail-sampling selector for distributed traces.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tss {__version__}")
    parser.add_argument("command", choices=("run", "demo", "check", "bootstrap"), metavar="command")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "demo": _demo,
        "check": _check,
        "bootstrap": _bootstrap,
    }
    try:
        return commands[options.command](options.rest)
    except ConfigError as fault:
        print(f"tss {options.command}: {fault}", file=sys.stderr)
        return fault.exit_code
    except TssError as fault:
        print(f"tss {options.command}: {fault}", file=sys.stderr)
        return 1


def _run(rest: list[str]) -> int:
    argparse.ArgumentParser(prog="tss run", description="Run a worker until SIGTERM.").parse_args(rest)
    settings = config.load(os.environ)
    logs.setup(settings.observability, settings.app.instance_id)
    gc.disable()  # what comes now stays: looking for garbage among it takes a tenth of the start …
    from tss.service import Service  # takes a second to load, and `check` needs none of it

    gc.freeze()  # … and most of each later look
    gc.enable()
    service = Service(settings)
    stopping = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stopping.is_set():
            log.warning("Second %s: leaving at once; another worker goes on", signal.Signals(number).name)
            logging.shutdown()
            os._exit(1)
        stopping.set()
        service.cancel()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        service.start()
        service.wait()
    except ConfigError:
        service.stop()
        raise
    except Exception:
        log.exception("The worker stops because of a fault it does not know")
        service.stop()
        return 1
    if not service.stop():
        logging.shutdown()
        os._exit(0)  # a thread that still waits for an answer must not hold the process
    return 0


def _demo(rest: list[str]) -> int:
    from tss import demo

    return demo.main(rest)


def _check(rest: list[str]) -> int:
    from tss import probe

    parser = argparse.ArgumentParser(prog="tss check", description="Validate the settings without starting.")
    parser.add_argument("--connect", action="store_true", help="also try every outside part")
    options = parser.parse_args(rest)
    settings = config.load(os.environ)
    print(config.describe(settings))
    if not options.connect:
        print("The settings are valid.")
        return 0
    results = probe.probe(settings)
    print(probe.render(results))
    return 0 if all(result.ok for result in results) else 1


def _bootstrap(rest: list[str]) -> int:
    from tss import bootstrap

    parser = argparse.ArgumentParser(
        prog="tss bootstrap", description="Make what tss needs from the outside parts."
    )
    bootstrap.add_arguments(parser)
    steps, plan = bootstrap.plan_of(parser.parse_args(rest))
    settings = config.load(os.environ)
    logs.setup(settings.observability, settings.app.instance_id)
    bootstrap.run(settings, steps, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
