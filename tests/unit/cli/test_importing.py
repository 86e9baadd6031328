"""Ctrl-C while the command line is imported."""

import signal
import subprocess
import sys

import pytest

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, {handler})
from deployments.cli import main

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "deployments.cli.client":
            print("importing", flush=True)
            try:
                time.sleep(20)
            except KeyboardInterrupt:
                pass  # as an import may do that tries whether it can do something
        return None

sys.meta_path.insert(0, Slow())
sys.exit(main([{command!r}, "--help"]))
"""


def interrupt(handler: str, command: str, *, again: int | None = None) -> tuple[int, str]:
    """The exit status and stderr of a command that is interrupted while it imports, then sent another signal."""
    code = SLOW.format(handler=handler, command=command)
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        if again is not None:
            process.send_signal(again)
        _, said = process.communicate(timeout=30)
        return process.returncode, said


@pytest.mark.parametrize("command", ["up", "list"])
def test_an_interrupt_during_an_import_ends_the_command_in_one_line(command: str) -> None:
    assert interrupt("signal.default_int_handler", command) == (130, f"pyramid-serve {command}: interrupted\n")


def test_a_server_in_the_background_of_a_script_is_interrupted_too() -> None:
    assert interrupt("signal.SIG_IGN", "up") == (130, "pyramid-serve up: interrupted\n")


def test_a_client_in_the_background_of_a_script_is_not() -> None:
    assert interrupt("signal.SIG_IGN", "list", again=signal.SIGTERM)[0] == -signal.SIGTERM
