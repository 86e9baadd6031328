import io
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image

from pyramid_serve.media import writers as video
from pyramid_serve.media.ffmpeg import EncodeError
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.media.writers import AnimationWriter, Mp4Writer, check_video_path, write_video

HEIGHT, WIDTH = 64, 128


def clip(num_frames: int) -> torch.Tensor:
    """Smooth frames that get brighter, told apart by their mean."""
    ramp = torch.linspace(0, 60, WIDTH).expand(HEIGHT, WIDTH)
    shades = torch.stack([ramp, ramp.flip(1), ramp / 2], dim=-1)
    return torch.stack([shades + 180 * index / num_frames for index in range(num_frames)]).to(torch.uint8)


def decode(file: Path) -> torch.Tensor:
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(file),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return torch.from_numpy(numpy.frombuffer(raw, numpy.uint8).copy()).view(-1, HEIGHT, WIDTH, 3)


def describe(file: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(file), "-vf", "showinfo", "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


# --- files


def test_an_mp4_holds_every_frame_as_h264_with_its_index_in_front(tmp_path: Path) -> None:
    frames = clip(17)
    write_video(frames.split(8), tmp_path / "a.mp4", fps=24)
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.shape == frames.shape
    assert (decoded.float() - frames.float()).abs().mean() < 3
    description = describe(tmp_path / "a.mp4")
    assert "h264" in description
    assert "yuv420p(tv, bt709" in description
    assert "24 fps" in description
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_gif_holds_every_frame_in_good_colours(tmp_path: Path) -> None:
    frames = clip(9)
    write_video(frames, tmp_path / "a.gif", fps=24)
    decoded = decode(tmp_path / "a.gif")
    assert decoded.shape == frames.shape
    assert (decoded.float() - frames.float()).abs().mean() < 4


@pytest.mark.parametrize(("name", "delays"), [("a.gif", [130, 120, 130, 120]), ("a.webp", [125, 125, 125, 125])])
def test_an_animation_loops_at_the_true_rate(tmp_path: Path, name: str, delays: list[int]) -> None:
    frames = clip(8)
    write_video(frames.split(3), tmp_path / name, fps=8)
    with Image.open(tmp_path / name) as picture:
        assert (picture.size, picture.info["loop"], getattr(picture, "n_frames", 1)) == ((WIDTH, HEIGHT), 0, 8)
        shown = []
        for index in range(8):
            picture.seek(index)
            picture.load()
            shown.append(picture.info["duration"])
            decoded = torch.from_numpy(numpy.asarray(picture.convert("RGB")).copy())
            assert (decoded.float() - frames[index].float()).abs().mean() < 4
    assert shown == delays * 2


def test_a_zip_holds_every_frame_exactly(tmp_path: Path) -> None:
    frames = clip(3)
    write_video([frames[:1], frames[1:]], tmp_path / "a.zip", fps=24)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.namelist() == ["00000.png", "00001.png", "00002.png"]
        for index, name in enumerate(packed.namelist()):
            picture = numpy.asarray(Image.open(io.BytesIO(packed.read(name))))
            assert numpy.array_equal(picture, frames[index].numpy())


def test_a_folder_gets_every_frame_exactly(tmp_path: Path) -> None:
    frames = clip(3)
    write_video([frames[:1], frames[1:]], tmp_path / "frames", fps=24)
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "frames/00002.png")), frames[2].numpy())


def test_a_png_holds_a_single_frame_exactly(tmp_path: Path) -> None:
    write_video(clip(1), tmp_path / "a.png", fps=24)
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a.png")), clip(1)[0].numpy())


def test_a_png_refuses_a_second_frame(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds one frame and there is more than one"):
        write_video(clip(2), tmp_path / "a.png", fps=24)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.png", "a.zip", "frames"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_video_that_breaks_off_leaves_nothing(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        yield clip(1)
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_video(chunks(), tmp_path / name, fps=24)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.png", "a.zip", "frames"])
def test_a_video_without_frames_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"none were written|no frame"):
        write_video([], tmp_path / name, fps=24)
    assert not list(tmp_path.iterdir())


def test_a_video_that_breaks_off_leaves_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(RuntimeError), Mp4Writer(tmp_path / "a.mp4", fps=24) as writer:
        writer.write(clip(1))
        raise RuntimeError
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


def test_nothing_lies_at_the_path_before_the_video_is_whole(tmp_path: Path) -> None:
    writer = Mp4Writer(tmp_path / "a.mp4", fps=24)
    writer.write(clip(9))
    assert not (tmp_path / "a.mp4").exists()
    writer.close()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_an_error_of_ffmpeg_tells_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "gif_options", lambda fps: ("-c:v", "no_such_codec", "-f", "gif"))
    with pytest.raises(EncodeError, match="no_such_codec"):
        write_video(clip(200).split(50), tmp_path / "a.gif", fps=24)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_encoder_comes_with_the_next_frames_or_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> bytes:
        raise EncodeError("ffmpeg failed: no memory")

    monkeypatch.setattr(video, "encode_fragment", fail)
    for chunks in (clip(9).split(8), [clip(1)]):
        with pytest.raises(EncodeError, match="no memory"):
            write_video(chunks, tmp_path / "a.mp4", fps=24)
        assert not list(tmp_path.iterdir())


def test_frames_whose_memory_is_used_again_are_encoded_as_they_were(tmp_path: Path) -> None:
    frames = clip(64)

    def reused() -> Iterator[torch.Tensor]:
        buffer = torch.empty(8, HEIGHT, WIDTH, 3, dtype=torch.uint8)
        for chunk in frames.split(8):
            yield buffer.copy_(chunk)

    write_video(reused(), tmp_path / "a.mp4", fps=24)
    assert (decode(tmp_path / "a.mp4").float() - frames.float()).abs().mean() < 3


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_a_size_that_is_refused_is_not_that_of_the_video(tmp_path: Path, name: str) -> None:
    writer: Mp4Writer | AnimationWriter = (Mp4Writer if name == "a.mp4" else AnimationWriter)(tmp_path / name, fps=24)
    with pytest.raises(ValueError, match="must be even"):
        writer.write(torch.zeros(1, 63, WIDTH, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="none were written"):
        writer.close()


def test_an_mp4_is_the_one_that_a_server_makes_of_the_same_units(tmp_path: Path) -> None:
    units = clip(17).split([1, 8, 8])
    write_video(iter(units), tmp_path / "a.mp4", fps=24)
    fragments = [
        encode_fragment(unit.numpy(), index=i, first_frame=max(8 * i - 7, 0), fps=24) for i, unit in enumerate(units)
    ]
    join_fragments(fragments, tmp_path / "joined.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "joined.mp4").read_bytes()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(1, HEIGHT, WIDTH, 3), r"must be uint8 \(F, H, W, 3\), not torch.float32"),
        (torch.zeros(3, 1, HEIGHT, WIDTH, dtype=torch.uint8), r"not torch.uint8 \(3, 1, 64, 128\)"),
        (torch.zeros(1, 63, WIDTH, 3, dtype=torch.uint8), "size 128x63, but a video's must be even"),
    ],
)
def test_frames_of_another_form_are_refused(tmp_path: Path, frames: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(frames, tmp_path / "a.mp4", fps=24)


def test_frames_of_another_size_than_the_first_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size 128x32, but the video is 128x64"):
        write_video([clip(1), clip(1)[:, :32]], tmp_path / "a.mp4", fps=24)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.avi", r"must end in .mp4, .gif, .webp, .png"), ("no/a.mp4", "no folder"), ("full", "no empty folder")],
)
def test_a_path_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").touch()
    with pytest.raises(ValueError, match=message):
        check_video_path(tmp_path / name)


def test_a_name_with_a_colon_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(clip(2), "12:30.mp4", fps=24)
    assert [path.name for path in tmp_path.iterdir()] == ["12:30.mp4"]


def test_an_ffmpeg_that_stalls_is_killed_and_leaves_the_older_file(
    tmp_path: Path, fake_ffmpeg: Callable[[str], Path]
) -> None:
    fake_ffmpeg("exec sleep 60")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.gif").write_bytes(b"older")
    frames = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)  # more than a pipe holds
    with (
        pytest.raises(EncodeError, match=r"within 0\.3 s and was killed"),
        AnimationWriter(tmp_path / "out/a.gif", fps=24, stall_timeout_s=0.3) as writer,
    ):
        writer.write(frames)
    assert [file.read_bytes() for file in (tmp_path / "out").iterdir()] == [b"older"]


def test_a_writer_that_is_closed_takes_no_more_frames(tmp_path: Path) -> None:
    writer = Mp4Writer(tmp_path / "a.mp4", fps=24)
    writer.write(clip(1))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="the video is closed"):
        writer.write(clip(1))
    assert decode(tmp_path / "a.mp4").shape[0] == 1
