"""What can be asked about videos, for HTTP and Ray handles alike: submit, get, list, follow, cancel, delete.

Every replica that answers clients has a ``Videos``. It reads the storage and asks claims, and keeps nothing about a
video itself, so any replica can answer for every video, whichever orchestrator makes it.
"""

import asyncio
import io
import logging
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple
from uuid import uuid4

from PIL import Image
from ray.serve.handle import DeploymentHandle

from deployments.claims.asking import UNREACHABLE, ask_claims
from deployments.claims.messages import QueuePlace, QueueState
from deployments.claims.places import NOWHERE
from deployments.rpc.tasks import apart, begin_apart
from deployments.videos.mirror import Mirror
from deployments.videos.submissions import Submissions
from deployments.videos.view import VideoView
from pyramid_serve.api import Plan, RequestError, Status, VideoRecord, VideoRequest, new_record
from pyramid_serve.media.pictures import fitted, read_picture
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import StorageError, VideoFile, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_WATCH_S = 10.0
_GET_S = 2.0


class Accepted(NamedTuple):
    """The answer to a request: the record and the place of its video, and whether this request created that video."""

    record: VideoRecord
    place: QueuePlace
    is_new: bool


class Videos:
    """All videos under one storage root."""

    def __init__(self, store: VideoStore, claims: DeploymentHandle[Any], models: ServedModels) -> None:
        self.store = store
        self.models = models
        self._claims = claims
        self._submissions = Submissions(claims)
        self.mirror = Mirror(claims)
        """The unfinished videos."""

    async def submit(self, request: VideoRequest, *, idempotency_key: str | None = None) -> VideoRecord:
        """The record of ``accept``."""
        return (await self.accept(request, idempotency_key=idempotency_key)).record

    async def accept(self, request: VideoRequest, *, idempotency_key: str | None = None) -> Accepted:
        """Accept a video. It will be made, whatever happens to this process.

        With a key that was used before, the record is that of the video accepted then. Raises ``RequestError`` for what
        cannot be made, and ``QueueFullError``.
        """
        asked, picture = await self._prepare(request, idempotency_key)
        # To its end even if the caller leaves: claims may accept it all the same, and then its picture must stay.
        return await apart(self._submit(asked, picture))

    async def remix(self, source_id: str, request: VideoRequest, *, idempotency_key: str | None = None) -> Accepted:
        """Accept a video with the settings and the picture of another one; see ``ServedModel.replan``.

        Raises ``VideoNotFoundError`` where that one is not there, and what ``accept`` raises.
        """
        source: VideoRecord = await asyncio.to_thread(self.store.read, source_id)
        plan = self.models.choose(source.plan.model).replan(source.plan, request)
        picture = None
        if plan.has_picture:
            try:
                picture = await asyncio.to_thread(self.store.files.fetch, source_id, VideoFile.PICTURE)
            except VideoNotFoundError:
                raise RequestError(f"{source_id}: its picture is not there any more", param="video_id") from None
        asked = new_record(
            plan,
            idempotency_key=idempotency_key,
            remixed_from=source_id,
            user=request.user,
            metadata=request.metadata,
        )
        return await apart(self._submit(asked, picture))

    async def accept_while_wanted(self, request: VideoRequest, *, idempotency_key: str | None = None) -> Accepted:
        """``accept`` for a caller who waits until the video is over.

        If the caller leaves before the video is accepted, the video is cancelled as soon as it is.
        """
        asked, picture = await self._prepare(request, idempotency_key)
        # Claims accepts it even if nobody waits for that, so only the answer tells whether there is a video to cancel.
        submitting = begin_apart(self._submit(asked, picture))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            begin_apart(self._give_up(submitting))
            raise

    async def _prepare(self, request: VideoRequest, key: str | None) -> tuple[VideoRecord, bytes | None]:
        """The record to be accepted, and the picture as a PNG file."""
        model = self.models.choose(request.model)
        plan = model.plan(request)
        picture = None
        if request.input_reference is not None:
            picture = await asyncio.to_thread(
                _to_png, request.input_reference, plan, max_pixels=model.limits.max_picture_pixels
            )
        return new_record(plan, idempotency_key=key, user=request.user, metadata=request.metadata), picture

    async def _submit(self, asked: VideoRecord, picture: bytes | None) -> Accepted:
        """The picture is written here, so that claims passes on records only."""
        is_new = False
        try:
            if picture is not None:
                await asyncio.to_thread(self.store.files.put_picture, asked.id, picture)
            record, place = await self._submissions.submit(asked)
            is_new = record.id == asked.id
        finally:
            if picture is not None and not is_new:
                await apart(self._remove_picture(asked.id))
        return Accepted(record, place, is_new=is_new)

    async def _remove_picture(self, video_id: str) -> None:
        """Remove the picture of a video that was not accepted, unless it was, though no answer came."""
        try:
            if not await asyncio.to_thread(self.store.exists, video_id):
                await asyncio.to_thread(self.store.withdraw, video_id)
        except StorageError as error:
            logger.warning("a picture without a video is not removed: %s", error, extra={"video_id": video_id})

    async def _give_up(self, submitting: asyncio.Task[Accepted]) -> None:
        await asyncio.wait([submitting])
        if submitting.exception() is None and submitting.result().is_new:
            await self.cancel_unwanted(submitting.result().record.id)

    async def get(self, video_id: str) -> VideoView:
        """A video as it is now. Raises ``VideoNotFoundError``."""
        record = await asyncio.to_thread(self.store.read, video_id)
        if record.is_over:
            return VideoView(record)
        try:
            async with asyncio.timeout(_GET_S):
                seen: tuple[VideoRecord, QueuePlace] | None = await self._claims.look.remote(video_id)
            # None: it ended between the two looks.
            return VideoView(await asyncio.to_thread(self.store.read, video_id)) if seen is None else VideoView(*seen)
        except UNREACHABLE:
            return VideoView(record)  # the saved record is true, though it may be some seconds old

    async def list(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True, status: Status | None = None
    ) -> tuple[list[VideoView], bool]:
        """At most ``limit`` videos following ``after`` in the order of creation, and whether there are more.

        status: only those with this status.
        """
        records, has_more = await asyncio.to_thread(
            self.store.page, limit=limit, after=after, newest_first=newest_first, status=status
        )
        return [VideoView(record) for record in records], has_more

    async def cancel(self, video_id: str) -> VideoRecord:
        """End a video now; one that is over stays as it is. Raises ``VideoNotFoundError``."""
        record: VideoRecord = await ask_claims(lambda: self._claims.cancel.remote(video_id))
        self.mirror.hear(record)
        return record

    async def cancel_unwanted(self, video_id: str) -> None:
        """``cancel`` a video whose caller has left. It is no error if the video was deleted meanwhile."""
        logger.info("cancelled, its caller has left", extra={"video_id": video_id})
        try:
            await self.cancel(video_id)
        except VideoNotFoundError:
            logger.info("deleted meanwhile", extra={"video_id": video_id})

    async def delete(self, video_id: str) -> None:
        """Cancel a video if it is unfinished, and remove it. Raises ``VideoNotFoundError``."""
        token = uuid4().hex
        await ask_claims(lambda: self._claims.delete.remote(video_id, token))
        self.mirror.hear_deleted(video_id)

    async def queue(self) -> QueueState:
        """How many videos wait and how many are in progress. Raises one of ``UNREACHABLE`` while claims is replaced."""
        state: QueueState = await self._claims.queue.remote()
        return state

    async def wait(self, video_id: str) -> VideoRecord:
        """The record when the video is over. Raises ``VideoNotFoundError``, also when it is deleted meanwhile."""
        record: VideoRecord = await asyncio.to_thread(self.store.read, video_id)
        while not record.is_over:
            record = await self._next_change(record) or record
        return record

    async def events(self, video_id: str) -> AsyncGenerator[VideoView, None]:
        """The video as it is now, and again after each change, until it is over. Raises ``VideoNotFoundError``.

        Of changes that follow each other within a tenth of a second only the last may be told.
        """
        view = await self.get(video_id)
        yield view
        while not view.record.is_over:
            record = await self._next_change(view.record)
            if record is not None:
                view = VideoView(record) if record.is_over else VideoView(record, await self._place(video_id))
                yield view

    async def fragments(self, video_id: str) -> AsyncGenerator[bytes, None]:
        """The fragments of the stream, each as soon as it exists; every viewer gets the same bytes, at any time.

        Ends early if the video fails. Raises ``VideoNotFoundError``, also when it is deleted meanwhile.
        """
        record = await asyncio.to_thread(self.store.read, video_id)
        unit = 0
        while unit < record.plan.num_units:
            if unit < record.num_units_done:
                yield await asyncio.to_thread(self.store.files.load_fragment, video_id, unit)
                unit += 1
            elif record.is_over:
                return
            else:
                record = await self._next_change(record) or record

    async def _next_change(self, record: VideoRecord) -> VideoRecord | None:
        """The record once it has another revision or is over; None if it does not change for some seconds."""
        view = self.mirror.get(record.id)
        if view is not None:
            if view.record.revision <= record.revision:
                await self.mirror.wait(record.id, timeout_s=_WATCH_S)
                view = self.mirror.get(record.id)
            if view is not None:
                return view.record if view.record.revision > record.revision else None
            return await self._saved_if_changed(record)
        try:
            async with asyncio.timeout(2 * _WATCH_S):
                changed: VideoRecord | None = await self._claims.watch.remote(record.id, record.revision, _WATCH_S)
                if changed is not None:
                    self.mirror.hear(changed)
                return changed
        except UNREACHABLE:
            await asyncio.sleep(0.5)
            return await self._saved_if_changed(record)

    async def _saved_if_changed(self, record: VideoRecord) -> VideoRecord | None:
        saved = await asyncio.to_thread(self.store.read, record.id)
        self.mirror.hear(saved)
        return saved if saved.revision != record.revision or saved.is_over else None

    async def _place(self, video_id: str) -> QueuePlace:
        view = self.mirror.get(video_id)
        if view is not None:
            return view.place
        try:
            async with asyncio.timeout(_GET_S):
                place: QueuePlace = await self._claims.place.remote(video_id)
                return place
        except UNREACHABLE:
            return NOWHERE


def picture_of(picture: bytes, plan: Plan, *, max_pixels: int | None) -> Image.Image:
    """A picture file of any accepted format at the size of the video that is made from it.

    Raises ``RequestError`` where none can be made of it.
    """
    try:
        image = read_picture(picture, max_pixels=max_pixels, name="input_reference")
        return fitted(image, height=plan.height, width=plan.width, name="input_reference")
    except ValueError as error:
        raise RequestError(str(error), param="input_reference") from None


def _to_png(picture: bytes, plan: Plan, *, max_pixels: int) -> bytes:
    content = io.BytesIO()
    picture_of(picture, plan, max_pixels=max_pixels).save(content, format="PNG")
    return content.getvalue()
