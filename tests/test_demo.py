"""`tss demo` as a stranger meets it: one command, an account, commands to paste, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.parts import ROOT, environment_with

pytestmark = [pytest.mark.embedded, pytest.mark.timeout(240)]

ACCOUNT_SECS = 90.0
ENDS_WITHIN_SECS = 15.0


class Demo:
    """The command, running in an empty folder that is also its place for temporary files."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tss.demo", *options],
            cwd=folder,
            env=environment_with({"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.output += line

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + ACCOUNT_SECS
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def ends(self, within_secs: float) -> int:
        code = self.process.wait(within_secs)
        self._reader.join()
        return code

    def children(self) -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for demo in started:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.ends(ENDS_WITHIN_SECS)


def alive(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_once_gives_the_account_and_leaves_nothing(tmp_path: Path, demos: list[Demo]) -> None:
    """It ends by itself with 0, every trace that mattered is in the table whole, and no file is left."""
    demo = Demo(tmp_path, "--once", "--traces", "300")
    demos.append(demo)
    assert demo.ends(ACCOUNT_SECS) == 0, demo.output
    made = re.search(r"knows of (\d+) that failed and (\d+) that were slow, (\d+) in all", demo.output)
    whole = re.search(
        r"^all (\d+) are in the table, with every one of their spans", demo.output, re.MULTILINE
    )
    assert made, demo.output
    assert whole, demo.output
    assert int(made[3]) > 5
    assert whole[1] == made[3]
    traces = re.findall(r"^  (?:kept|dropped) +\w+ +([\d,]+)", demo.output, re.MULTILINE)
    assert sum(int(n.replace(",", "")) for n in traces) == 300
    assert re.search(r"fewer\.$", demo.output, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("curl") is None, reason="pastes curl lines")
def test_its_commands_work_word_for_word_until_ctrl_c(tmp_path: Path, demos: list[Demo]) -> None:
    """Each command it prints works as it stands while it runs, also on other ports; Ctrl-C ends it without a trace."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = Demo(tmp_path, "--port", port)
        demos.append(refused)
        assert refused.ends(ENDS_WITHIN_SECS) == 78
        assert f"--port {port}" in refused.output

    demo = Demo(tmp_path, "--traces", "100")
    demos.append(demo)
    demo.wait_for("| grep ^tail_sampling_traces")
    commands = re.findall(r"^    (curl (?:.*\\\n)*.*)$", demo.output, re.MULTILINE)
    assert len(commands) == 5
    answers = [
        subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout
        for command in commands
    ]
    for answer in answers[:3]:
        assert json.loads(answer)["success"] is True, answer
    assert json.loads(answers[3])
    assert "tail_sampling_traces_ingested_total" in answers[4]

    children = demo.children()
    assert children
    demo.process.send_signal(signal.SIGINT)
    assert demo.ends(ENDS_WITHIN_SECS) == 0, demo.output
    assert "Traceback" not in demo.output
    assert not any(alive(pid) for pid in children)
    assert not list(tmp_path.iterdir())


def test_sigterm_while_it_works_leaves_only_what_was_asked_for(tmp_path: Path, demos: list[Demo]) -> None:
    """Ended in the middle by SIGTERM it goes in seconds; `--keep` is the one folder left, with table and log."""
    kept = tmp_path / "kept"
    demo = Demo(tmp_path, "--keep", str(kept))
    demos.append(demo)
    demo.wait_for("decided")
    children = demo.children()
    demo.process.send_signal(signal.SIGTERM)
    assert demo.ends(ENDS_WITHIN_SECS) == 0, demo.output
    assert not any(alive(pid) for pid in children)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert {"table", "tss.log"} <= {p.name for p in kept.iterdir()}

    again = Demo(tmp_path, "--keep", str(kept))
    demos.append(again)
    assert again.ends(ENDS_WITHIN_SECS) == 78
    assert "not empty" in again.output
