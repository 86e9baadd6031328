"""Videos of a storage: accepted now, or at some time."""

from pyramid_serve.api import VideoRecord, new_record, new_video_id
from pyramid_serve.storage import VideoStore
from tests.unit.api.plans_at_hand import record_of

PLAN = record_of(seed=1).plan


def record_at(created_at: float) -> VideoRecord:
    return new_record(PLAN).model_copy(update={"id": new_video_id(created_at), "created_at": created_at})


def accepted(store: VideoStore) -> VideoRecord:
    record = new_record(PLAN)
    store.create(record)
    return record
