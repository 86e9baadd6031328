"""The way to run the ffmpeg program: with a time limit, and with ``EncodeError`` for every failure."""

import contextlib
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence

import imageio_ffmpeg

STALL_TIMEOUT_S = 300.0
"""How long a streaming ffmpeg may read nothing, or take to end after its input. It encodes even a large frame in a
second and copies the file once at its end (faststart); five minutes leave room for a disk or machine under load."""

_OPTIONS = ("-hide_banner", "-loglevel", "error", "-nostats", "-y")
_MAX_SAID_CHARACTERS = 1000


class EncodeError(RuntimeError):
    """ffmpeg failed or ran into its time limit. The message ends with its own error messages."""


def raw_frames(*, width: int, height: int, fps: float) -> tuple[str, ...]:
    """Input options for frames of 8-bit RGB without a container, ``width`` x ``height`` pixels."""
    return ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps))


def run_ffmpeg(arguments: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> bytes:
    """What ffmpeg writes to its standard output when run with these arguments.

    Raises ``EncodeError`` if it fails, or does not end within ``timeout_s`` seconds; then it is killed.
    """
    try:
        finished = subprocess.run(_command(arguments), input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise EncodeError(_timeout_message(timeout_s, error.stderr or b"")) from None
    if finished.returncode:
        raise EncodeError(_failure_message(finished.returncode, finished.stderr))
    return finished.stdout


class FfmpegStream:
    """A running ffmpeg that is fed through its standard input. ``kill`` must be called in the end."""

    def __init__(self, arguments: Sequence[str], *, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill; a pipe could fill up and block ffmpeg)
        self._process = subprocess.Popen(
            _command(arguments), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, bufsize=0
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)

    def write(self, content: memoryview) -> None:
        """Pass bytes on. Raises ``EncodeError`` if ffmpeg has ended, or has read nothing for the stall timeout."""
        left = content.cast("B")
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        while left:
            if not poll.poll(self._stall_timeout_s * 1000):
                raise EncodeError(self._stalled())
            try:
                left = left[os.write(self._stdin.fileno(), left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise EncodeError(self._ended()) from None

    def finish(self) -> None:
        """Close the input and wait for the end. Raises ``EncodeError`` if ffmpeg fails or does not end in time."""
        self._stdin.close()
        try:
            self._process.wait(self._stall_timeout_s)
        except subprocess.TimeoutExpired:
            raise EncodeError(self._stalled()) from None
        if self._process.returncode:
            raise EncodeError(self._ended())

    def kill(self) -> None:
        """End the process, if it still runs, and close its files."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._log.close()

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its input and is about to end
            self._process.wait(self._stall_timeout_s)
        if self._process.returncode is None:
            return self._stalled()
        return _failure_message(self._process.returncode, self._said())

    def _stalled(self) -> str:
        self._process.kill()
        self._process.wait()
        return _timeout_message(self._stall_timeout_s, self._said())

    def _said(self) -> bytes:
        self._log.seek(0)
        return self._log.read()


def _command(arguments: Sequence[str]) -> list[str]:
    return [imageio_ffmpeg.get_ffmpeg_exe(), *_OPTIONS, *arguments]


def _failure_message(returncode: int, said: bytes) -> str:
    return f"ffmpeg ended with {returncode}: {_text(said)}"


def _timeout_message(timeout_s: float, said: bytes) -> str:
    return f"ffmpeg made no progress or did not end within {timeout_s:g} s and was killed: {_text(said)}"


def _text(said: bytes) -> str:
    return said.decode(errors="replace").strip()[-_MAX_SAID_CHARACTERS:] or "it said nothing"
