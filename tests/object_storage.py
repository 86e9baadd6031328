"""An S3 of one's own: moto's server in a thread of this process, which any filesystem of fsspec finds by itself."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import boto3
import fsspec
from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_ACCESS = {"key": "testing", "secret": "testing"}


class QuietHandler(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Its lines would stand between those of the tests."""


@contextmanager
def serve_s3() -> Iterator[str]:
    """The URL of an S3 that is there for as long as the block runs."""
    app = create_backend_app("s3")
    turn = threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # Like the real one: moto itself looks whether an object is there, and then writes it.
        with turn:
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join(10)
    server.server_close()


def settings_of(endpoint: str) -> dict[str, Any]:
    """The settings with which fsspec reaches an S3: those of ``s3`` in its configuration, or in ``FSSPEC_S3``."""
    return {"endpoint_url": endpoint, **_ACCESS}


@contextmanager
def bucket_at(endpoint: str) -> Iterator[str]:
    """The URL of a new bucket, ``s3://NAME``, at the S3 that fsspec uses while the block runs."""
    name = f"b-{uuid4().hex}"
    client(endpoint).create_bucket(Bucket=name)
    with reached_at(endpoint):
        yield f"s3://{name}"


@contextmanager
def reached_at(endpoint: str) -> Iterator[None]:
    """Let fsspec find S3 there while the block runs."""
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = settings_of(endpoint)
    try:
        yield
    finally:
        del fsspec.config.conf["s3"]
        if before is not None:
            fsspec.config.conf["s3"] = before


def environment_for(endpoint: str) -> dict[str, str]:
    """The environment variables by which another process finds it."""
    return {"FSSPEC_S3": json.dumps(settings_of(endpoint))}


def client(endpoint: str) -> Any:
    """A plain client of an S3, which knows nothing of fsspec."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=_ACCESS["key"],
        aws_secret_access_key=_ACCESS["secret"],
        region_name="us-east-1",
    )
