"""Which filesystem serves a root, and how the root is shown."""

import fsspec
import pytest

from pyramid_serve.filesystems import filesystem_of, shown_root


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gcs"), ("abfs", "azure")])
def test_a_filesystem_that_is_not_installed_is_named_with_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=rf'pip install "pyramid-serve\[{extra}\]"') as raised:
        filesystem_of(f"{protocol}://key:secret@bucket/videos")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("root", "shown"),
    [
        ("outputs", "outputs"),
        ("/videos/a:b@c", "/videos/a:b@c"),
        ("s3://bucket/videos", "s3://bucket/videos"),
        ("s3://AKIA:se/cr@t+@bucket/videos", "s3://***@bucket/videos"),
        ("s3://key:se/cret@bucket/videos", "s3://***@bucket/videos"),
        ("simplecache::s3://key:secret@bucket", "simplecache::s3://***@bucket"),
        ("abfs://container@account.example/videos", "abfs://container@account.example/videos"),
        ("https://host/videos?sig=abc", "https://host/videos?***"),
    ],
)
def test_a_root_is_shown_without_credentials(root: str, shown: str) -> None:
    assert shown_root(root) == shown
