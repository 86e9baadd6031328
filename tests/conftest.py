"""What all tests share: the golden checkpoints, and where another set of them lies."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network

import pytest
import torch

# A shell starts what runs in its background with SIGINT ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
PUBLISHED = TESTS / "published"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        action="append",
        help="a golden folder (golden.json, golden.safetensors, checkpoint/), or one of several such; may be repeated",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clusters of several nodes come first, whatever the order that was asked for: then no other Ray runs yet."""
    items.sort(key=lambda item: not item.path.is_relative_to(TESTS / "cluster"))


def golden_folders(config: pytest.Config) -> list[Path]:
    given = config.getoption("--golden") or [GOLDEN]
    folders = [
        folder
        for root in given
        for folder in ([root] if (root / "golden.json").is_file() else sorted(root.iterdir()))
        if (folder / "golden.json").is_file()
    ]
    if not folders:
        raise pytest.UsageError(f"--golden: no golden.json in {', '.join(map(str, given))}")
    return folders


@pytest.fixture(scope="session")
def miniflux() -> Path:
    """A tiny random checkpoint of the miniFLUX variant."""
    return GOLDEN / "miniflux" / "checkpoint"


@pytest.fixture(scope="session")
def mmdit() -> Path:
    """A tiny random checkpoint of the SD3 variant."""
    return GOLDEN / "mmdit" / "checkpoint"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 in this process, the same one for all tests."""
    from tests.object_storage import serve_s3  # here, since most runs need none

    with serve_s3() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[str]:
    """The URL of a new bucket, ``s3://NAME``, for this test."""
    from tests.object_storage import bucket_at

    with bucket_at(s3_endpoint) as root:
        yield root


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
