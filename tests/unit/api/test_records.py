import json
from typing import Any

from pyramid_serve.api import Stage, Status, VideoError, VideoRecord, new_record
from pyramid_serve.api.records import PUBLIC_NAMES
from pyramid_serve.families import record_fields
from pyramid_serve.pyramid_flow.planning import settings_of
from tests.unit.api.plans_at_hand import record_of

CONTRACT_KEYS = [
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size"),
    *("seconds", "remixed_from_video_id", "error"),
]


def test_the_video_object_begins_with_the_keys_of_the_contract() -> None:
    public = record_of(seconds="4").public()
    assert list(public)[:13] == CONTRACT_KEYS
    assert (public["object"], public["status"], public["progress"]) == ("video", "queued", 0)
    assert (public["seconds"], public["size"], public["num_frames"]) == ("4", "640x384", 97)
    assert "owner" not in public and "idempotency_key" not in public


def test_the_names_that_a_family_must_not_take_are_those_of_the_video_object() -> None:
    record = record_of()
    assert record.public().keys() - record.plan.settings.keys() == PUBLIC_NAMES


def test_what_a_family_keeps_never_takes_the_place_of_a_key_of_the_video_object() -> None:
    record = record_of(seed=3)
    plan = record.plan.model_copy(update={"settings": {"id": "another", "status": "completed", "sparkle": 3}})
    public = record.changed(plan=plan).public()
    assert (public["id"], public["status"], public["sparkle"]) == (record.id, "queued", 3)


def test_progress_is_100_only_at_the_end() -> None:
    record = record_of()
    assert record.changed(num_steps_done=record.plan.num_steps // 2).progress == 50
    assert record.changed(num_steps_done=record.plan.num_steps).progress == 99
    assert record.changed(status=Status.COMPLETED).progress == 100


def test_a_failed_video_has_no_completion_and_tells_why() -> None:
    error = VideoError(code="cancelled", message="no more")
    public = record_of().changed(status=Status.FAILED, error=error, completed_at=3.0).public()
    assert public["completed_at"] is None
    assert public["error"] == {"code": "cancelled", "message": "no more"}


def test_a_record_comes_through_json_whole() -> None:
    record = record_of()
    assert VideoRecord.model_validate_json(record.model_dump_json()) == record


def test_user_and_metadata_are_kept_and_given_back() -> None:
    plan = record_of().plan
    record = new_record(plan, user="me", metadata={"scene": "12"})
    public = VideoRecord.model_validate_json(record.model_dump_json()).public()
    assert (public["user"], public["metadata"]) == ("me", {"scene": "12"})
    public = record_of().public()
    assert (public["user"], public["metadata"]) == (None, None)


def test_records_of_version_1_are_read_as_what_they_were() -> None:
    record = record_of(seed=3, seconds=1, num_inference_steps=2, video_num_inference_steps=[1, 2, 3])
    old = record.model_dump(mode="json")
    for name in ("version", "plan", "user", "metadata"):
        del old[name]
    old["spec"] = {
        **{name: getattr(record.plan, name) for name in ("model", "prompt_suffix", "negative_prompt", "seconds")},
        **{"prompt": "an \x1b[31m escape and \u202e", "width": 640, "height": 384, "num_latent_frames": 4, "seed": 3},
        **{"num_inference_steps": [2, 2, 2], "video_num_inference_steps": [1, 2, 3]},
        **{"guidance_scale": 7.0, "video_guidance_scale": 5.0},
    }
    read = VideoRecord.model_validate(record_fields(json.loads(json.dumps(old))))
    assert read.plan == record.plan.model_copy(update={"prompt": old["spec"]["prompt"]})
    assert (read.version, read.user, read.metadata) == (2, None, None)
    assert settings_of(read.plan).sampling.linear_guidance is None


def test_a_record_of_version_1_with_linear_guidance_and_a_picture_is_read_as_what_it_was() -> None:
    fields: dict[str, Any] = {"linear_guidance_alpha": 1, "linear_guidance_minimum": 3, "input_reference": b"png"}
    record = record_of(seed=3, seconds=1, **fields)
    old = record.model_dump(mode="json")
    plan = old.pop("plan")
    del old["version"]
    names = ("model", "prompt", "prompt_suffix", "negative_prompt", "seconds", "width", "height", "seed", "has_picture")
    old["spec"] = {name: plan[name] for name in names} | plan["settings"]
    old["spec"] |= {"num_latent_frames": 4, "video_guidance_scale": 4.0}
    assert VideoRecord.model_validate(record_fields(old)) == record


def test_what_a_later_release_wrote_is_kept() -> None:
    record = record_of(seed=3).model_dump(mode="json")
    record["priority"] = 5
    record["plan"]["colours"] = {"depth": 10}
    record["plan"]["units"][0]["weight"] = 2
    record["timeline"] = [{"stage": "upscale", "unit": 0, "start": 1.0, "end": 2.0, "replica": "a", "device": "b"}]
    read = VideoRecord.model_validate(record_fields(record))
    assert json.loads(read.changed(owner="me").model_dump_json()) == record | {"owner": "me", "revision": 1}


def test_a_stage_that_is_known_is_read_as_one() -> None:
    record = record_of(seed=3).model_dump(mode="json")
    record["timeline"] = [{"stage": "denoise", "unit": 0, "start": 1.0, "end": 2.0, "replica": "a"}]
    assert VideoRecord.model_validate(record_fields(record)).timeline[0].stage is Stage.DENOISE


def test_a_record_of_a_family_that_is_not_known_here_can_be_shown() -> None:
    record = record_of(seed=3).model_dump(mode="json")
    record["plan"] |= {"family": "later", "settings": {"sparkle": 3}}
    public = VideoRecord.model_validate(record_fields(record)).public()
    assert (public["num_frames"], public["sparkle"], public["progress"]) == (57, 3, 0)
    assert "num_inference_steps" not in public


def test_every_change_has_its_revision() -> None:
    record = record_of()
    assert record.changed(owner="a").changed(owner="b").revision == 2
