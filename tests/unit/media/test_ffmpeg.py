import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyramid_serve.media.ffmpeg import EncodeError, FfmpegStream, run_ffmpeg

Fake = Callable[[str], Path]


def is_gone(pids: Path) -> bool:
    """Whether the process ended and was reaped; a zombie would still have its id."""
    try:
        os.kill(int(pids.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_its_output_is_returned(fake_ffmpeg: Fake) -> None:
    fake_ffmpeg("cat")
    assert run_ffmpeg([], stdin=b"frames", timeout_s=30) == b"frames"


def test_a_failure_tells_the_status_and_what_it_said(fake_ffmpeg: Fake) -> None:
    fake_ffmpeg("echo no such codec >&2; exit 3")
    with pytest.raises(EncodeError, match=r"^ffmpeg ended with 3: no such codec$"):
        run_ffmpeg([], timeout_s=30)


def test_a_failure_without_a_word_is_told_as_such(fake_ffmpeg: Fake) -> None:
    fake_ffmpeg("exit 1")
    with pytest.raises(EncodeError, match=r"^ffmpeg ended with 1: it said nothing$"):
        run_ffmpeg([], timeout_s=30)


def test_one_that_does_not_end_is_killed_and_reaped(fake_ffmpeg: Fake) -> None:
    pids = fake_ffmpeg("echo waiting >&2; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(EncodeError, match=r"did not end within 0\.5 s and was killed: waiting"):
        run_ffmpeg([], stdin=bytes(1_000_000), timeout_s=0.5)
    assert time.monotonic() - started < 10
    assert is_gone(pids)


# --- a stream


def write(stream: FfmpegStream, num_bytes: int) -> None:
    try:
        stream.write(memoryview(bytes(num_bytes)))
        stream.finish()
    finally:
        stream.kill()


def test_a_stream_passes_all_bytes_on(fake_ffmpeg: Fake, tmp_path: Path) -> None:
    fake_ffmpeg(f"cat > {tmp_path}/out")
    write(FfmpegStream([]), 3_000_000)
    assert (tmp_path / "out").stat().st_size == 3_000_000


def test_a_slow_reader_that_makes_progress_is_waited_for(fake_ffmpeg: Fake) -> None:
    fake_ffmpeg("for i in 1 2 3 4; do head -c 50000 > /dev/null; sleep 0.6; done; cat > /dev/null")
    write(FfmpegStream([], stall_timeout_s=2.0), 400_000)


def test_a_stream_that_is_read_no_further_is_killed_and_reaped(fake_ffmpeg: Fake) -> None:
    pids = fake_ffmpeg("echo stuck >&2; exec sleep 60")
    stream = FfmpegStream([], stall_timeout_s=0.5)
    with pytest.raises(EncodeError, match=r"no progress .* within 0\.5 s and was killed: stuck"):
        stream.write(memoryview(bytes(1_000_000)))
    assert is_gone(pids)
    stream.kill()


def test_a_stream_that_does_not_end_after_its_input_is_killed_and_reaped(fake_ffmpeg: Fake) -> None:
    pids = fake_ffmpeg("cat > /dev/null; exec sleep 60")
    stream = FfmpegStream([], stall_timeout_s=0.5)
    stream.write(memoryview(bytes(10)))
    with pytest.raises(EncodeError, match="was killed"):
        stream.finish()
    assert is_gone(pids)
    stream.kill()


def test_a_stream_that_ends_early_tells_why(fake_ffmpeg: Fake) -> None:
    fake_ffmpeg("echo disk full >&2; exit 5")
    stream = FfmpegStream([])
    with pytest.raises(EncodeError, match=r"^ffmpeg ended with 5: disk full$"):
        write(stream, 10_000_000)


def test_a_stream_can_be_killed_at_any_time(fake_ffmpeg: Fake) -> None:
    pids = fake_ffmpeg("exec sleep 60")
    stream = FfmpegStream([])
    while not pids.is_file() or not pids.read_text():
        time.sleep(0.01)
    stream.kill()
    stream.kill()
    assert is_gone(pids)


def test_media_can_be_encoded_and_pictures_read_without_torch() -> None:
    code = """
import sys
from PIL import Image
from pyramid_serve.media import ffmpeg, fragments, previews
from pyramid_serve.media.pictures import covering_size, read_picture
picture = read_picture(Image.new("RGB", (4, 4)))
covering_size(picture, height=64, width=64)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
