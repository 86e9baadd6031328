import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from pyramid_serve import stored_files
from pyramid_serve.api import Status, new_record, new_video_id
from pyramid_serve.storage import (
    StorageError,
    VideoExistsError,
    VideoFile,
    VideoNotFoundError,
    VideoStore,
)
from pyramid_serve.stored_files import StoredFiles
from tests.switched_storage import SwitchedFileSystem, refusing
from tests.unit.storage_at_hand import PLAN, ROOTS, accepted, record_at, root_at

LATENTS = numpy.arange(16 * 8 * 16, dtype=numpy.float32).reshape(16, 1, 8, 16)


@pytest.fixture
def switched(tmp_path: Path) -> VideoStore:
    """A storage that can be made to refuse."""
    return VideoStore(f"switched://{tmp_path}/storage", patience_s=0.0)


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


@pytest.mark.parametrize(
    "video_id", ["../../etc", "", "video_0", pytest.param(new_video_id() + "/..", id="an id and /..")]
)
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


@pytest.mark.parametrize(("kind", "expected"), [("local", {1}), ("memory", set(range(4, 17)))])
def test_records_of_an_object_store_are_read_many_at_once(
    kind: str, expected: set[int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cat, lock = StoredFiles.cat, threading.Lock()
    num_now, most = 0, 0

    def slow_cat(files: StoredFiles, path: str) -> bytes:
        nonlocal num_now, most
        with lock:
            num_now += 1
            most = max(most, num_now)
        time.sleep(0.02)
        with lock:
            num_now -= 1
        return cat(files, path)

    with root_at(kind, request) as root:
        store = VideoStore(root)
        records = [record_at(1e9 + number) for number in range(24)]
        for record in records:
            store.create(record)
        monkeypatch.setattr(StoredFiles, "cat", slow_cat)
        assert store.page(limit=20, newest_first=False) == (records[:20], True)
        assert most in expected


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


def test_the_state_of_a_unit_is_that_of_its_latest_attempt_until_the_unit_is_there(store: VideoStore) -> None:
    record, files = accepted(store), store.files
    assert files.load_state(record.id, 0) is None
    assert files.save_state(record.id, 0, 1, b"first") and files.save_state(record.id, 0, 1, b"second")
    assert files.save_state(record.id, 1, 1, b"another unit")
    assert files.load_state(record.id, 0) == b"second"
    assert files.save_state(record.id, 0, 10, b"third")
    assert not files.save_state(record.id, 0, 9, b"late")
    assert files.load_state(record.id, 0) == b"third"
    files.save_latents(record.id, 0, LATENTS)
    files.remove_states(record.id, [0])
    assert not files.save_state(record.id, 0, 10, b"late")
    assert files.load_state(record.id, 0) is None and files.load_state(record.id, 1) == b"another unit"
    store.delete(record.id)
    assert files.load_state(record.id, 1) is None
    with pytest.raises(VideoNotFoundError):
        files.save_state(record.id, 1, 2, b"late")


def test_a_state_that_comes_while_the_unit_is_saved_does_not_stay(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, put = accepted(store), StoredFiles.put

    def finish_then_put(self: StoredFiles, path: str, content: bytes) -> None:
        monkeypatch.undo()
        store.files.save_latents(record.id, 0, LATENTS)
        store.files.remove_states(record.id, [0])
        put(self, path, content)

    monkeypatch.setattr(StoredFiles, "put", finish_then_put)
    assert not store.files.save_state(record.id, 0, 1, b"late")
    assert store.files.load_state(record.id, 0) is None


def test_a_file_among_the_states_that_is_none_is_left_alone(tmp_path: Path) -> None:
    store = VideoStore(str(tmp_path))
    record = accepted(store)
    store.files.save_state(record.id, 0, 1, b"state")
    (tmp_path / "videos" / record.id / "states" / ".DS_Store").write_bytes(b"")
    assert store.files.load_state(record.id, 0) == b"state"
    store.files.remove_states(record.id, [0, 1])
    assert store.files.load_state(record.id, 0) is None


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


def test_a_large_file_reaches_an_object_store_whole(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_files, "_MAX_PUT_FROM_MEMORY_BYTES", 1000)
    store = VideoStore(bucket)
    record = accepted(store)
    for size in (1000, 1001, 12_000_000):
        (tmp_path / "frames.zip").write_bytes(os.urandom(size))
        store.files.attach(record.id, VideoFile.FRAMES, tmp_path / "frames.zip")
        assert store.files.fetch(record.id, VideoFile.FRAMES) == (tmp_path / "frames.zip").read_bytes()
    store.delete(record.id)
    assert store.ids() == []


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


def test_a_sweep_looks_for_each_record_once_in_an_hour(switched: VideoStore) -> None:
    records = [record_at(1e6 + number) for number in range(3)]
    for record in records:
        switched.create(record)
        switched.end(record.changed(status=Status.COMPLETED, expires_at=3e6))

    def looked_at() -> list[str]:
        SwitchedFileSystem.calls.clear()
        assert switched.sweep(retention_s=1e6, now=1.5e6) == []
        return [path for operation, path in SwitchedFileSystem.calls if operation == "info" and "video_" in path]

    assert len(looked_at()) == 3
    assert looked_at() == []
    assert len(switched.sweep(retention_s=1e6, now=3.5e6)) == 3
