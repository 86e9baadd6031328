"""``pyramid-serve batch``: many videos from a file of requests, some at once, going on where an earlier run ended.

The folder of the results has a video for each request, ``results.jsonl`` with a line for each that is over, and
``batch.json``, by which a later run of the same batch is known: its requests have the same idempotency keys, so videos
that the server was making when this ended are fetched and not made again.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.cli.client import add_client_command, server_of
from deployments.cli.printing import reason_of, say, status_of
from pyramid_serve.terminal import printable
from pyramid_serve.whole_files import create_whole

if TYPE_CHECKING:
    from deployments.cli.server import Server

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_RESULTS = "results.jsonl"
_BATCH = "batch.json"
_NAME = re.compile(r"\w([\w.-]*[\w-])?")
_MAX_NAME_BYTES = 200
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that are no files on Windows."""
_AWAY_S = 5.0
"""The pause between two tries while the server is away."""
_POLL_S = 1.0
_MAX_IN_FLIGHT = 64


def add_batch_command(commands: "Commands") -> None:
    """Add the command to a command line."""
    parser = add_client_command(commands, "batch", "make many videos from a file of requests")
    parser.set_defaults(run=batch)
    parser.description = (
        f"{parser.description} Run it again to go on where it ended: what is there is not made again, and what failed "
        "is tried again. The exit status is 0 only if all videos are there."
    )
    parser.add_argument(
        "requests",
        type=Path,
        help="a .jsonl file with a JSON object of request fields in each line, or a .csv file with the names of the "
        "fields in its first line. Beside the fields of the API: image, the file of a picture (a path from where this "
        "file is), and name, that of the result (its number unless given)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the results")
    parser.add_argument(
        "--in-flight", type=int, default=8, metavar="N", help="videos asked for at once; 8 unless given"
    )


@dataclass(frozen=True)
class Row:
    """One request of the file."""

    line: int
    name: str
    fields: Mapping[str, Any]
    image: Path | None

    @cached_property
    def digest(self) -> str:
        """Of what decides the video: rows that are alike have different names."""
        picture = None if self.image is None else hashlib.sha256(self.image.read_bytes()).hexdigest()
        content = json.dumps([self.name, self.fields, picture], sort_keys=True)
        return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:32]


def batch(arguments: argparse.Namespace) -> int:
    """Run ``pyramid-serve batch``; the exit status, 1 if a video is missing at its end."""
    if not 1 <= arguments.in_flight <= _MAX_IN_FLIGHT:
        raise ValueError(f"--in-flight {arguments.in_flight}: must be from 1 to {_MAX_IN_FLIGHT}")
    rows = read_rows(arguments.requests)
    is_over = threading.Event()
    server = server_of(arguments, pause=partial(_pause, is_over))
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {arguments.output}: {error.strerror}") from None
    folder = Folder(arguments.output)
    left = [row for row in rows if not folder.has(row)]
    if len(left) < len(rows):
        say(f"{len(rows) - len(left)} of {len(rows)} videos are there already", file=sys.stderr)
    num_failed = _make_all(server, folder, left, is_over, num_in_flight=arguments.in_flight)
    say(f"{len(rows) - num_failed} of {len(rows)} videos are in {arguments.output}")
    return 1 if num_failed else 0


# --- the requests -----------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[Row]:
    """The requests of a file. Raises ``ValueError`` naming the line of the first that is wrong in itself."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{file}: cannot be read: {reason}") from None
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{file}: must be a .jsonl or a .csv file")
    rows: list[Row] = []
    lines_of: dict[str, int] = {}
    for line, fields in _csv_lines(file, text) if file.suffix.lower() == ".csv" else _json_lines(file, text):
        row = _row_of(file, line, fields, number=len(rows) + 1)
        if row.name.casefold() in lines_of:  # some disks do not tell A from a
            raise ValueError(f"{file}:{line}: name {row.name!r} is that of line {lines_of[row.name.casefold()]} too")
        lines_of[row.name.casefold()] = line
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: has no requests")
    return rows


def _json_lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except RecursionError:
            raise ValueError(f"{file}:{line}: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{file}:{line}: not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f'{file}:{line}: must be a JSON object, like {{"prompt": "a red ball"}}')
        yield line, fields


def _csv_lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if reader.fieldnames is None or "prompt" not in reader.fieldnames:
            raise ValueError(f"{file}:1: must name the fields, prompt among them")
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(f"{file}:{reader.line_num}: must have {len(reader.fieldnames)} values")
            yield reader.line_num, {name: value for name, value in fields.items() if value != ""}
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None


def _row_of(file: Path, line: int, fields: dict[str, Any], *, number: int) -> Row:
    name, image = fields.pop("name", f"{number:05}"), fields.pop("image", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _DEVICE.fullmatch(name):
        raise ValueError(f"{file}:{line}: name {name!r:.60}: must be letters, digits, _, - and dots, and no path")
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f"{file}:{line}: name {name!r:.60}: has more than {_MAX_NAME_BYTES} bytes")
    if not isinstance(fields.get("prompt"), str) or not fields["prompt"].strip():
        raise ValueError(f"{file}:{line}: prompt: is required")
    if image is None:
        return Row(line, name, fields, None)
    if not isinstance(image, str):
        raise ValueError(f"{file}:{line}: image {image!r:.60}: must be the name of a file")
    path = file.parent / image
    if not os.path.isfile(path) or not os.access(path, os.R_OK):  # not of Path: it raises for a name that is too long
        raise ValueError(f"{file}:{line}: image {printable(str(path))[:200]}: no such file that can be read")
    return Row(line, name, fields, path)


# --- the results ------------------------------------------------------------------------------------------------------


class Folder:
    """The results. Only one thread may write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = self._read_token()
        self._made: dict[str, str] = {}
        """The digest of the request that each file was made by last, by its name."""
        self._num_failures: dict[str, int] = {}
        for result in self._read_results():
            digest = str(result.get("request"))
            if result.get("status") == "completed":
                self._made[str(result.get("name"))] = digest
            else:
                self._num_failures[digest] = self._num_failures.get(digest, 0) + 1

    def file_of(self, row: Row) -> Path:
        return self.path / f"{row.name}.mp4"

    def has(self, row: Row) -> bool:
        """Whether the video of this very request is there."""
        # The file first: a digest reads the row's picture.
        return row.name in self._made and self.file_of(row).is_file() and self._made[row.name] == row.digest

    def key_of(self, row: Row) -> str:
        """The idempotency key of the next try: another one after a failure, which the server would tell again."""
        tries = self._num_failures.get(row.digest, 0)
        return hashlib.sha256(f"{self._token}/{row.digest}/{tries}".encode()).hexdigest()

    def add(self, row: Row, result: Mapping[str, Any]) -> None:
        """Write down how a request ended."""
        line = json.dumps({"name": row.name, "line": row.line, "request": row.digest, **result}, ensure_ascii=False)
        with (self.path / _RESULTS).open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a run before was killed while it wrote
                    file.write(b"\n")
            file.write(line.encode(errors="backslashreplace") + b"\n")

    def _read_token(self) -> str:
        file = self.path / _BATCH
        if file.exists():
            try:
                return str(json.loads(file.read_text())["token"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}: not the file of a batch; take another folder") from None
        if any(not each.name.startswith(".") for each in self.path.iterdir()):
            raise ValueError(f"--output {self.path}: has files that are not of a batch; take an empty folder")
        token = uuid.uuid4().hex
        create_whole(file, (json.dumps({"token": token}) + "\n").encode())
        return token

    def _read_results(self) -> Iterator[dict[str, Any]]:
        file = self.path / _RESULTS
        if not file.exists():
            return
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                result = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if isinstance(result, dict):
                yield result


# --- making them ------------------------------------------------------------------------------------------------------


def _pause(is_over: threading.Event, seconds: float) -> None:
    """Wait, unless the command ends meanwhile: then the thread ends too."""
    if is_over.wait(seconds):
        raise KeyboardInterrupt


def _make_all(
    server: "Server", folder: Folder, rows: Sequence[Row], is_over: threading.Event, *, num_in_flight: int
) -> int:
    """Make the videos of these rows; how many failed. Raises ``ServerError`` where the server cannot be had.

    Once the server has answered, it is waited for without end while it is away or its queue is full.
    """
    from tqdm import tqdm  # here, so that Ctrl-C during this slow import is handled too

    has_answered = threading.Event()
    waiting: dict[Future[dict[str, Any]], Row] = {}
    upcoming = iter(rows)
    num_failed = 0
    with (
        ThreadPoolExecutor(num_in_flight, thread_name_prefix="batch") as threads,
        tqdm(total=len(rows), unit="video", disable=None) as bar,
    ):
        try:
            while True:
                for row in islice(upcoming, num_in_flight - len(waiting)):
                    task = threads.submit(
                        _make, server, row, folder.file_of(row), folder.key_of(row), has_answered, is_over
                    )
                    waiting[task] = row
                if not waiting:
                    return num_failed
                for task in wait(waiting, return_when=FIRST_COMPLETED).done:
                    row, result = waiting.pop(task), task.result()
                    folder.add(row, result)
                    bar.update()
                    if result["status"] != "completed":
                        num_failed += 1
                        bar.set_postfix_str(f"{num_failed} failed")
                        tqdm.write(f"{row.name} (line {row.line}): {printable(result['error'])}", file=sys.stderr)
        except BaseException:
            is_over.set()
            if waiting:
                say("\nRun it again to go on. What the server is making is fetched then.", file=sys.stderr)
            raise


def _make(
    server: "Server", row: Row, output: Path, key: str, has_answered: threading.Event, is_over: threading.Event
) -> dict[str, Any]:
    """Make one video and fetch it; how it ended."""
    from deployments.cli.server import AwayError, NothingAnswersError, RefusedError

    began = time.time()
    while True:
        try:
            video = server.submit(row.fields, picture=row.image, key=key)
            has_answered.set()
            while video["status"] not in ("completed", "failed"):
                _pause(is_over, _POLL_S)
                video = server.get(video["id"])
            told = {"id": video["id"], "seed": video["seed"], "seconds": round(time.time() - began, 3)}
            if video["status"] != "completed":
                return {"status": status_of(video), "error": reason_of(video), **told}
            server.download(video["id"], output)
            return {"status": "completed", "file": output.name, **told}
        except RefusedError as error:
            has_answered.set()
            return {"status": "refused", "error": str(error)}
        except (AwayError, NothingAnswersError):
            if not has_answered.is_set():
                raise
            _pause(is_over, _AWAY_S)  # its key has the request go on with the same video
