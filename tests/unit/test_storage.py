import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from pyramid_serve.api import Status, new_record, new_video_id
from pyramid_serve.storage import (
    StorageError,
    VideoExistsError,
    VideoFile,
    VideoNotFoundError,
    VideoStore,
)
from pyramid_serve.stored_files import StoredFiles
from tests.switched_storage import FULL, READ_ONLY, READS, refusing
from tests.unit.storage_at_hand import PLAN, ROOTS, accepted, record_at, root_at

LATENTS = numpy.arange(16 * 8 * 16, dtype=numpy.float32).reshape(16, 1, 8, 16)


@pytest.fixture
def switched(tmp_path: Path) -> VideoStore:
    """A storage that can be made to refuse."""
    return VideoStore(f"switched://{tmp_path}/storage", patience_s=0.0)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=ROOTS)
def store(request: pytest.FixtureRequest) -> Iterator[VideoStore]:
    with root_at(request.param, request) as root:
        yield VideoStore(root)


@pytest.mark.parametrize(
    "content", ["", "3", "null", '{"id": 1, "spec": null}', '{"spec": []}', '{"spec": {}}', "[" * 100_000]
)
def test_a_record_that_is_none_does_not_keep_the_others_from_being_found(tmp_path: Path, content: str) -> None:
    store = VideoStore(str(tmp_path))
    broken, whole = accepted(store), accepted(store)
    (tmp_path / "videos" / broken.id / "video.json").write_text(content)
    assert [record.id for record in store.page(limit=10)[0]] == [whole.id]
    assert [record.id for record in store.unfinished()] == [whole.id]
    assert store.sweep(retention_s=0.0) == []
    store.delete(broken.id)
    with pytest.raises(VideoNotFoundError):
        store.read(broken.id)


def test_a_record_is_read_as_it_was_written(store: VideoStore) -> None:
    record = accepted(store)
    assert store.read(record.id) == record
    store.update(record.changed(status=Status.IN_PROGRESS))
    assert store.read(record.id).status is Status.IN_PROGRESS


def test_an_id_is_taken_once(store: VideoStore) -> None:
    record = accepted(store)
    with pytest.raises(VideoExistsError):
        store.create(record)


def test_what_is_not_there_is_said_so(store: VideoStore) -> None:
    video_id = new_video_id()
    reads = (
        lambda: store.read(video_id),
        lambda: store.delete(video_id),
        lambda: store.update(record_at(1e9)),
        lambda: store.files.fetch(video_id, VideoFile.VIDEO),
        lambda: store.files.size_of(video_id, VideoFile.VIDEO),
        lambda: store.files.load_fragment(video_id, 0),
        lambda: store.files.load_unit_latents(video_id, 0),
    )
    for read in reads:
        with pytest.raises(VideoNotFoundError):
            read()
    assert store.files.load_latents(video_id) == store.files.fragment_sizes(video_id) == []
    assert store.files.num_fragments(video_id) == 0
    assert store.page() == ([], False) and store.unfinished() == []


@pytest.mark.parametrize("video_id", ["../../etc", "", "video_0", new_video_id() + "/.."])
def test_what_is_no_id_never_becomes_a_path(store: VideoStore, video_id: str) -> None:
    with pytest.raises(ValueError, match="must be video_"):
        store.read(video_id)


def test_pages_follow_the_order_of_creation(store: VideoStore) -> None:
    ids = []
    for created_at in (1e9, 1e9 + 1, 1e9 + 2):
        record = record_at(created_at)
        store.create(record)
        ids.append(record.id)
    newest, has_more = store.page(limit=2)
    assert [record.id for record in newest] == [ids[2], ids[1]] and has_more
    rest, has_more = store.page(limit=2, after=ids[1])
    assert [record.id for record in rest] == [ids[0]] and not has_more
    oldest, has_more = store.page(limit=2, newest_first=False)
    assert [record.id for record in oldest] == ids[:2] and has_more
    store.delete(ids[1])
    assert [record.id for record in store.page(after=ids[1])[0]] == [ids[0]]
    assert store.page(limit=0) == ([], True)


def test_unfinished_videos_are_found_without_the_others(store: VideoStore) -> None:
    queued, done = accepted(store), accepted(store)
    store.end(done.changed(status=Status.COMPLETED))
    assert store.unfinished() == [queued]


def test_latents_and_fragments_come_back_up_to_the_first_that_is_missing(store: VideoStore) -> None:
    record = accepted(store)
    for unit in (0, 1, 3):
        store.files.save_latents(record.id, unit, LATENTS + unit)
        store.files.save_fragment(record.id, unit, bytes([unit]))
    loaded = store.files.load_latents(record.id)
    assert len(loaded) == 2 and numpy.array_equal(loaded[1], LATENTS + 1) and loaded[1].dtype == numpy.float32
    assert numpy.array_equal(store.files.load_unit_latents(record.id, 3), LATENTS + 3)
    assert store.files.num_fragments(record.id) == 2
    assert store.files.fragment_sizes(record.id) == [
        len(store.files.load_fragment(record.id, unit)) for unit in range(2)
    ]
    assert store.files.load_fragment(record.id, 1) == b"\x01"


def test_files_are_attached_and_read_in_parts(store: VideoStore, tmp_path: Path) -> None:
    record = new_record(PLAN)
    store.files.put_picture(record.id, b"picture")
    store.create(record)
    assert store.files.fetch(record.id, VideoFile.PICTURE) == b"picture"
    (tmp_path / "made.mp4").write_bytes(b"0123456789")
    store.files.attach(record.id, VideoFile.VIDEO, tmp_path / "made.mp4")
    store.files.attach(record.id, VideoFile.THUMBNAIL, b"webp")
    assert store.files.fetch(record.id, VideoFile.VIDEO) == b"0123456789"
    assert store.files.size_of(record.id, VideoFile.VIDEO) == 10
    assert store.files.read_range(record.id, VideoFile.VIDEO, 2, 5) == b"234"


def test_a_deleted_video_stays_deleted_under_a_late_writer(store: VideoStore) -> None:
    record = accepted(store)
    store.files.save_latents(record.id, 0, LATENTS)
    store.delete(record.id)
    with pytest.raises(VideoNotFoundError):
        store.files.save_latents(record.id, 1, LATENTS)
    with pytest.raises(VideoNotFoundError):
        store.update(record)
    assert not store.exists(record.id) and store.ids() == [] and store.unfinished() == []


def test_a_video_is_deleted_though_a_file_comes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VideoStore(str(tmp_path))
    record = accepted(store)
    store.files.save_latents(record.id, 0, LATENTS)
    folder = tmp_path / "videos" / record.id
    rmdir, num_late = os.rmdir, 0

    def rmdir_late(path: str, *, dir_fd: int | None = None) -> None:
        nonlocal num_late
        if num_late < 2:
            num_late += 1
            (folder / "latents" / "001.safetensors").write_bytes(b"late")
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir_late)
    store.delete(record.id)
    assert num_late == 2
    assert not folder.exists()


def test_a_video_deleted_between_look_and_write_leaves_nothing(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = accepted(store)
    put = StoredFiles.put

    def delete_then_put(self: StoredFiles, path: str, content: bytes) -> None:
        monkeypatch.undo()
        store.delete(record.id)
        put(self, path, content)

    monkeypatch.setattr(StoredFiles, "put", delete_then_put)
    with pytest.raises(VideoNotFoundError):
        store.files.save_fragment(record.id, 0, b"late")
    assert store.ids() == []


def test_a_sweep_takes_what_has_expired_and_nothing_else(store: VideoStore) -> None:
    expired, kept, running, young = (record_at(1000.0 + index) for index in range(4))
    young = record_at(5000.0)
    for record in (expired, kept, running, young):
        store.create(record)
    store.end(expired.changed(status=Status.COMPLETED, expires_at=3000.0))
    store.end(kept.changed(status=Status.COMPLETED, expires_at=9000.0))
    assert store.sweep(retention_s=1000.0, now=4000.0) == [expired.id]
    assert store.ids(newest_first=False) == [kept.id, running.id, young.id]


def test_a_key_stands_for_one_id(store: VideoStore) -> None:
    assert store.keys.id_of("../../key") is None
    video_id = new_video_id()
    store.keys.bind("../../key", video_id)
    assert store.keys.id_of("../../key") == video_id
    assert VideoStore(store.root).keys.id_of("../../key") == video_id
    with pytest.raises(ValueError, match="idempotency_key"):
        store.keys.bind("", video_id)


def test_a_key_goes_with_its_video_but_not_with_another(store: VideoStore) -> None:
    first, second = record_at(1.0).changed(idempotency_key="a"), record_at(2.0).changed(idempotency_key="a")
    for record in (first, second):
        store.create(record)
    assert store.keys.bind("a", first.id) == first.id
    assert store.keys.bind("a", second.id) == first.id
    store.keys.release("a", first.id)
    assert store.keys.bind("a", second.id) == second.id
    store.delete(first.id)
    assert store.keys.id_of("a") == second.id
    store.delete(second.id)
    assert store.keys.id_of("a") is None


def test_a_record_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    store = VideoStore(str(tmp_path))
    broken, fine = record_at(1.0), record_at(2.0)
    for record in (broken, fine):
        store.create(record)
    (tmp_path / "videos" / broken.id / "video.json").write_text('{"from": "a later version"}')
    assert [record.id for record in store.unfinished()] == [fine.id]
    assert [record.id for record in store.page()[0]] == [fine.id]
    assert store.sweep(retention_s=1.0, now=100.0) == []
    store.delete(broken.id)
    assert store.ids() == [fine.id]


def test_what_a_killed_writer_left_is_swept_away_after_a_while(tmp_path: Path) -> None:
    store = VideoStore(str(tmp_path))
    accepted(store)
    old, young = tmp_path / "aside" / "old", tmp_path / "aside" / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.sweep(retention_s=1000.0)
    assert list((tmp_path / "aside").iterdir()) == [young]


def test_no_reader_ever_sees_half_a_record(tmp_path: Path) -> None:
    store = VideoStore(str(tmp_path))
    record = accepted(store)
    is_over = threading.Event()

    def write() -> None:
        for index in range(200):
            store.update(record.changed(owner="x" * (1 + index * 97 % 5000)))
        is_over.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not is_over.is_set():
        store.read(record.id)
    writer.join()
    assert list((tmp_path / "aside").iterdir()) == []


# --- the end of a video ---------------------------------------------------------------------------------------------


def test_a_video_ends_once_and_late_writers_do_not_undo_it(store: VideoStore) -> None:
    record = accepted(store)
    ended = store.end(record.changed(status=Status.COMPLETED))
    assert store.end(record.changed(status=Status.FAILED)) == ended
    store.update(record.changed(status=Status.IN_PROGRESS))
    assert store.read(record.id) == ended
    assert store.page()[0] == [ended] and store.unfinished() == []


def test_an_end_that_was_interrupted_is_the_end(switched: VideoStore, tmp_path: Path) -> None:
    record = accepted(switched)
    with refusing(errno.ENOSPC, operations=("pipe_file",), containing="video.json"), pytest.raises(StorageError):
        switched.end(record.changed(status=Status.COMPLETED))
    ended = switched.read(record.id)
    assert ended.status is Status.COMPLETED
    assert switched.holds.terms() == {record.id: 0}
    switched.settle(ended)
    assert switched.holds.terms() == {} and switched.read(record.id) == ended


def test_what_was_left_without_a_record_is_swept_away_after_a_while(store: VideoStore) -> None:
    young, old = record_at(10_000.0), record_at(1.0)
    for record in (young, old):
        store.files.put_picture(record.id, b"picture")
        store.holds.accept(record.id, "gone")
        store.keys.bind(record.id, record.id)
    store.sweep(retention_s=1e6, now=10_001.0)
    assert store.ids() == [young.id] and list(store.holds.terms()) == [young.id]
    assert store.keys.id_of(old.id) is None and store.keys.id_of(young.id) == young.id


# --- a storage that refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", FULL + READ_ONLY)
@pytest.mark.parametrize("what", ["video.json", "unfinished"])
def test_of_a_video_that_is_not_accepted_nothing_is_left(
    switched: VideoStore, tmp_path: Path, what: str, number: int
) -> None:
    kept = accepted(switched)
    before = files_of(tmp_path)
    with refusing(number, operations=("pipe_file",), containing=what), pytest.raises(StorageError) as raised:
        switched.create(new_record(PLAN))
    assert raised.value.errno == number
    assert f"cannot be written: {os.strerror(number)}" in str(raised.value)
    assert files_of(tmp_path) == before
    assert [record.id for record in switched.unfinished()] == [kept.id]


def test_where_nothing_was_written_nothing_is_said_to_be_left(
    switched: VideoStore, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing(errno.EROFS), pytest.raises(StorageError):
        switched.create(new_record(PLAN))
    assert caplog.messages == []


def test_a_full_local_disk_leaves_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = VideoStore(str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: store.create(new_record(PLAN)),
        lambda: store.keys.bind("key", new_video_id()),
        lambda: store.write_epoch("epoch"),
        store.check,
    ):
        with pytest.raises(StorageError, match="No space left on device"):
            write()
    assert files_of(tmp_path) == [] and store.ids() == []


class BackendError(Exception):
    """As object stores raise them: no OSError."""


def test_an_error_of_an_object_store_is_one_of_the_storage(switched: VideoStore) -> None:
    record = accepted(switched)
    with refusing(BackendError("403 Forbidden\n<Error>"), operations=READS):
        for read in (
            lambda: switched.read(record.id),
            lambda: switched.exists(record.id),
            lambda: switched.files.fetch(record.id, VideoFile.VIDEO),
            lambda: switched.files.size_of(record.id, VideoFile.VIDEO),
            lambda: switched.page(),
            lambda: switched.read_epoch(),
            lambda: switched.keys.id_of("key"),
            lambda: switched.files.num_fragments(record.id),
        ):
            with pytest.raises(StorageError, match=r"cannot be read: 403 Forbidden$"):
                read()
    assert switched.exists(record.id)


@pytest.mark.parametrize("number", READ_ONLY)
@pytest.mark.parametrize("operation", ["rm_file", "rm"])
def test_a_video_that_cannot_be_deleted_is_still_whole(
    switched: VideoStore, tmp_path: Path, number: int, operation: str
) -> None:
    record = accepted(switched)
    switched.files.attach(record.id, VideoFile.VIDEO, b"video")
    before = files_of(tmp_path)
    with refusing(number, operations=(operation,)), pytest.raises(StorageError):
        switched.delete(record.id)
    assert files_of(tmp_path) == before
    assert switched.read(record.id) == record and switched.files.fetch(record.id, VideoFile.VIDEO) == b"video"
    switched.delete(record.id)
    assert files_of(tmp_path) == []


def test_a_video_is_deleted_from_a_full_disk(switched: VideoStore, tmp_path: Path) -> None:
    record = accepted(switched)
    with refusing(errno.ENOSPC, operations=("pipe_file",)):
        switched.delete(record.id)
    assert files_of(tmp_path) == []


def test_a_marker_that_was_not_removed_is_swept_away(switched: VideoStore, tmp_path: Path) -> None:
    record = record_at(1000.0)
    switched.create(record)
    with refusing(errno.EACCES, operations=("rm_file",), containing="unfinished"):
        switched.delete(record.id)
    assert not switched.exists(record.id) and switched.unfinished() == []
    switched.sweep(retention_s=10.0, now=1000.0 + 3601.0)
    assert files_of(tmp_path) == []


def test_what_cannot_be_removed_does_not_keep_the_rest_from_being_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VideoStore(str(tmp_path))
    stuck, expired = (record_at(at).changed(expires_at=50.0, status=Status.COMPLETED) for at in (10.0, 20.0))
    for record in (stuck, expired):
        store.create(record)
        store.end(record)
    remove_folder = StoredFiles.remove_folder

    def remove_unless_stuck(stored: StoredFiles, folder: str) -> None:
        if stuck.id in folder:
            raise StorageError(errno.EACCES, "denied")
        remove_folder(stored, folder)

    monkeypatch.setattr(StoredFiles, "remove_folder", remove_unless_stuck)
    (tmp_path / "keys" / "0").mkdir(parents=True)
    store.keys.bind("k", expired.id)
    store.keys.bind("unused", "video_" + "0" * 32)
    assert store.sweep(retention_s=1.0, now=1e9) == [expired.id]
    assert store.exists(stuck.id)
    store.sweep(retention_s=1.0, now=1e9)
    assert store.keys.id_of("unused") is None
