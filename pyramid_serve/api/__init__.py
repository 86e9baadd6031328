"""Requests for videos and records of them, as clients see them: over HTTP, over Ray handles and on disk.

A ``VideoRequest`` is what a client sends. A model's family makes a ``Plan`` of it, which leaves nothing open, so that
the same plan is the same video. A ``VideoRecord`` is what is known of one accepted video.
"""

from pyramid_serve.api.errors import MODEL_NOT_FOUND, RequestError, unknown_model
from pyramid_serve.api.ids import created_at_of, is_video_id, new_video_id
from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer
from pyramid_serve.api.plans import Plan, UnitRun
from pyramid_serve.api.records import Computed, Stage, Status, TimelineEntry, VideoError, VideoRecord, new_record
from pyramid_serve.api.requests import VideoRequest, parse_request

__all__ = [
    "MODEL_NOT_FOUND",
    "Computed",
    "Offer",
    "Plan",
    "RequestError",
    "RequestLimits",
    "Stage",
    "Status",
    "TimelineEntry",
    "UnitRun",
    "VideoError",
    "VideoRecord",
    "VideoRequest",
    "created_at_of",
    "is_video_id",
    "new_record",
    "new_video_id",
    "parse_request",
    "unknown_model",
]
