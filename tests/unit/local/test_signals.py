"""How commands that run Ray end by signals: each test in a process of its own, in which Ray's part is played."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
START = """
import ctypes, os, signal, subprocess, sys, time
from deployments.cli.ending import ending
from deployments.local.signals import undisturbed

def say(text):
    print(text, flush=True)

def default_action():  # as Ray leaves it behind, past Python
    ctypes.CDLL(None).signal(signal.SIGTERM, 0)
"""


class Process:
    """A program that is sent signals when it says so."""

    def __init__(self, code: str, *, ignored: int | None = None) -> None:
        before = None if ignored is None else signal.signal(ignored, signal.SIG_IGN)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        if ignored is not None:
            signal.signal(ignored, before)
        assert self.process.stdout is not None
        self.said = ""
        while "ready\n" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line

    def send(self, *numbers: int) -> tuple[int, str]:
        """The exit status and the output after these signals."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.1)
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


WORKING = """
with ending("up", terminated=0) as signals:
    signals.begin()
    default_action()
    try:
        say("ready")
        time.sleep(30)
    finally:
        with undisturbed():
            time.sleep(1)
            say("cleaned up")
"""


@pytest.mark.parametrize(
    ("numbers", "status", "last"),
    [
        ([signal.SIGTERM], 0, "pyramid-serve up: stopped"),
        ([signal.SIGTERM] * 5, 0, "pyramid-serve up: stopped"),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], 0, "pyramid-serve up: stopped"),
    ],
)
def test_sigterm_is_answered_once_whatever_ray_makes_of_it(numbers: list[int], status: int, last: str) -> None:
    code, out = Process(WORKING).send(*numbers)
    assert (code, out.splitlines()) == (status, ["cleaned up", last])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 5])
def test_ctrl_c_and_a_closed_terminal_end_it_as_an_interruption(number: int, times: int) -> None:
    code, out = Process(WORKING).send(*[number] * times)
    assert code == -signal.SIGINT  # what is left of KeyboardInterrupt without `cli.run`
    assert out.startswith("cleaned up\n") and out.count("cleaned up") == 1


def test_sigint_ends_what_a_script_started_in_the_background() -> None:
    _, out = Process(WORKING, ignored=signal.SIGINT).send(signal.SIGINT)
    assert out.startswith("cleaned up\n")


def test_what_nohup_started_survives_the_terminal() -> None:
    process = Process(WORKING, ignored=signal.SIGHUP)
    process.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.process.poll() is None
    assert process.send(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 0, "stopped"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 130, "interrupted")],
)
def test_a_signal_during_an_import_ends_it_at_once(number: int, status: int, said: str) -> None:
    code = """
with ending("up", terminated=0):
    while True:
        try:
            say("ready")
            time.sleep(30)
        except BaseException:  # as some packages have around an import
            pass
"""
    assert Process(code).send(number) == (status, f"pyramid-serve up: {said}\n")


def test_an_interruption_that_is_lost_is_raised_again() -> None:
    code = """
from deployments.local import signals as module
module._INSIST_S = 0.5
with ending("up", terminated=0) as signals:
    signals.begin()
    try:
        say("ready")
        time.sleep(30)
    except BaseException:  # as in a callback whose exceptions are only printed
        say("lost")
    time.sleep(30)
"""
    assert Process(code).send(signal.SIGTERM) == (0, "lost\npyramid-serve up: stopped\n")


def test_what_it_starts_can_be_ended_by_sigterm_and_outlives_the_terminal() -> None:
    code = """
with ending("up", terminated=0) as signals:
    signals.begin()
    child = "import signal, time; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True); time.sleep(30)"
    command = [sys.executable, "-c", child]
    started = subprocess.Popen(command, preexec_fn=lambda: None, stdout=subprocess.PIPE, text=True)
    is_ignored = "True" in started.stdout.readline()
    started.terminate()
    say(f"{is_ignored} {started.wait(10)}")
    say("ready")
    time.sleep(30)
"""
    process = Process(code)
    assert process.said.splitlines()[0] == f"True {-signal.SIGTERM}"
    process.send(signal.SIGTERM)
