"""Errors that may pass are waited out, others are raised at once."""

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pyramid_serve.patience import Patience, may_pass
from pyramid_serve.stored_files import StorageError, StoredFiles
from tests.faulty_proxy import Fault, faulty_proxy
from tests.object_storage import bucket_at, reached_at
from tests.switched_storage import FULL, READ_ONLY, SwitchedFileSystem, refusing


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyramid_serve.patience._FIRST_PAUSE_S", 0.01)


class Failing:
    """Work that fails so many times and then succeeds."""

    def __init__(self, error: Exception, num_failures: int) -> None:
        self.num_calls = 0
        self._error = error
        self._num_failures = num_failures

    def __call__(self) -> str:
        self.num_calls += 1
        if self.num_calls <= self._num_failures:
            raise self._error
        return "done"


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}")
        self.code = code


class AzureError(Exception):
    """As the Azure SDK raises it."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"{status_code}")
        self.status_code = status_code


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.EIO, "InternalError"),
        ConnectionResetError(),
        TimeoutError(),
        HttpError(503),
        HttpError(429),
        AzureError(500),
        Exception("of a class that nobody knows"),
    ],
)
def test_work_is_done_again_until_its_error_has_passed(error: Exception) -> None:
    assert may_pass(error)
    work = Failing(error, 3)
    assert Patience(30.0).wait_out(work) == "done"
    assert work.num_calls == 4


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, "full or read-only") for number in FULL + READ_ONLY),
        FileNotFoundError(errno.ENOENT, "NoSuchKey"),
        FileExistsError("PreconditionFailed"),
        PermissionError("AccessDenied"),
        OSError(errno.EINVAL, "InvalidBucketName"),
        HttpError(403),
        AzureError(409),
        ValueError("no bucket in the URL"),
    ],
)
def test_an_error_that_will_last_is_raised_at_once(error: Exception) -> None:
    assert not may_pass(error)
    work = Failing(error, 1)
    with pytest.raises(type(error)):
        Patience(30.0).wait_out(work)
    assert work.num_calls == 1


def test_patience_ends_and_the_last_error_is_raised() -> None:
    work = Failing(ConnectionResetError("gone"), 10_000)
    patience = Patience(0.3)

    def give_up() -> None:
        with pytest.raises(ConnectionResetError):
            patience.wait_out(work)

    assert seconds_of(give_up) < 3
    assert work.num_calls > 1


def test_without_patience_work_is_done_once() -> None:
    work = Failing(ConnectionResetError(), 1)
    with pytest.raises(ConnectionResetError):
        Patience(0.0).wait_out(work)
    assert work.num_calls == 1


def test_in_an_outage_that_others_have_waited_for_long_enough_a_call_fails_at_its_first_try() -> None:
    patience = Patience(0.1)
    for _ in range(2):
        work = Failing(ConnectionResetError(), 10_000)
        with pytest.raises(ConnectionResetError):
            patience.wait_out(work)
        time.sleep(0.15)
    assert work.num_calls == 1
    assert patience.wait_out(lambda: "done") == "done"  # the outage is over, and the next one is waited for
    assert patience.wait_out(Failing(ConnectionResetError(), 1)) == "done"


def test_an_outage_of_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(0.3)
    with pytest.raises(ConnectionResetError):
        patience.wait_out(Failing(ConnectionResetError(), 10_000))
    monkeypatch.setattr("pyramid_serve.patience._FORGOTTEN_S", 0.1)
    time.sleep(0.2)
    assert patience.wait_out(Failing(ConnectionResetError(), 1)) == "done"


def test_calls_of_many_threads_are_each_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(30.0)
    works = [Failing(ConnectionResetError(), number % 4) for number in range(16)]
    threads = [threading.Thread(target=patience.wait_out, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [work.num_calls for work in works] == [1 + number % 4 for number in range(16)]


# --- in a storage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", FULL + READ_ONLY)
def test_a_storage_that_is_full_or_read_only_is_told_at_once(tmp_path: Any, number: int) -> None:
    files = StoredFiles(f"switched://{tmp_path}", patience_s=60.0)
    SwitchedFileSystem.calls.clear()
    with refusing(number), pytest.raises(StorageError) as raised:
        files.put("a", b"content")
    assert raised.value.errno == number and len(SwitchedFileSystem.calls) == 1


def test_a_local_disk_is_never_waited_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "a broken disk")

    files = StoredFiles(str(tmp_path), patience_s=60.0)
    monkeypatch.setattr("os.fsync", fail)

    def put() -> None:
        with pytest.raises(StorageError):
            files.put("a", b"content")

    assert seconds_of(put) < 2


def test_every_kind_of_call_is_right_though_every_fourth_request_goes_wrong(s3_endpoint: str) -> None:
    with faulty_proxy(s3_endpoint) as proxy, bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        files = StoredFiles(root, patience_s=60.0)
        proxy.share, proxy.wait_s = 0.25, 0.02
        for number in range(4):
            name, content = f"a/{number}", b"x" * number
            files.put(name, content)
            assert files.cat(name) == content and files.size(name) == number and files.exists(name)
            files.create(f"b/{number}", content + b"first")
            with pytest.raises(FileExistsError):
                files.create(f"b/{number}", b"second")
            assert files.cat(f"b/{number}", start=0, end=5) == (content + b"first")[:5]
            files.remove_existing(f"b/{number}")
            with pytest.raises(FileNotFoundError):
                files.remove_existing(f"b/{number}")
        assert sorted(files.sizes("a")) == sorted(files.names("a")) == sorted(str(number) for number in range(4))
        files.remove_folder("a")
        assert files.names("a") == []
        assert all(proxy.num_faults[fault] > 0 for fault in Fault)


def test_a_storage_whose_server_is_gone_is_said_to_fail_when_patience_ends(s3_endpoint: str) -> None:
    with faulty_proxy(s3_endpoint) as proxy, bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        files = StoredFiles(root, patience_s=0.2)
        proxy.share, proxy.faults = 1.0, (Fault.RESET_BEFORE,)
        with pytest.raises(StorageError, match="cannot be written"):
            files.put("a", b"content")
        time.sleep(0.2)  # the last try may be earlier than that
        num_requests = len(proxy.requests)
        with pytest.raises(StorageError, match="cannot be read"):
            files.cat("a")
        assert len(proxy.requests) <= num_requests + 2  # aiohttp itself reads once more from a connection of its pool
        proxy.share = 0.0
        files.put("a", b"content")
        assert files.cat("a") == b"content"
