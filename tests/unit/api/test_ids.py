import pytest

from pyramid_serve.api import RequestError, created_at_of, is_video_id, new_video_id


def test_ids_have_one_form_and_sort_by_time() -> None:
    ids = [new_video_id(created_at) for created_at in (1e9, 1e9 + 0.002, 2e9)]
    assert ids == sorted(ids) and all(map(is_video_id, ids))
    assert created_at_of(ids[0]) == 1e9
    assert len({new_video_id(1e9) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "text", ["", "video_", "../../etc/passwd", "video_" + "0" * 31, "video_" + "0" * 33, "video_" + "G" * 32]
)
def test_anything_else_is_no_id(text: str) -> None:
    assert not is_video_id(text)
    assert not is_video_id(new_video_id() + "\n")
    with pytest.raises(RequestError):
        created_at_of(text)
