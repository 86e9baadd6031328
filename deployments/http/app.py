"""The HTTP server: the videos API in front of ``Videos``, as an ASGI application for any server."""

from fastapi import Depends, FastAPI

from deployments.http import docs
from deployments.http.config import HttpConfig
from deployments.http.door import Door, check_key
from deployments.http.errors import add_error_handlers
from deployments.http.guard import add_guards
from deployments.http.key_folder import KeyFolder
from deployments.http.keys import Keys
from deployments.http.page import add_page
from deployments.http.places import Places, Uploads
from deployments.http.pools import PoolHandles, Pools
from deployments.http.previews import Previews
from deployments.http.readiness import Readiness
from deployments.http.routes.content import router as content_routes
from deployments.http.routes.events import router as event_routes
from deployments.http.routes.models import router as model_routes
from deployments.http.routes.probes import router as probe_routes
from deployments.http.routes.remix import router as remix_routes
from deployments.http.routes.status import router as status_routes
from deployments.http.routes.stream import router as stream_routes
from deployments.http.routes.videos import router as video_routes
from deployments.videos.videos import Videos
from deployments.videos.views import Views


def create_app(videos: Videos, config: HttpConfig | None = None, *, pools: PoolHandles | None = None) -> FastAPI:
    """The ASGI application that answers for these videos. pools: those whose work ``/v1/status`` tells."""
    config = config or HttpConfig()
    app = docs.new_app()
    readiness = Readiness(videos.store, interval_s=config.storage_check_interval_s)
    app.state.door = Door(
        videos,
        Views(videos),
        config,
        readiness,
        uploads=Uploads(max_uploads=config.body.max_uploads, max_bytes=config.body.max_total_bytes),
        streams=Places(config.max_streams, kind="streams"),
        waits=Places(config.max_waits, kind="waits"),
        downloads=Places(config.max_downloads, kind="downloads"),
        keys=Keys(config.api_keys, folder=KeyFolder(config.api_keys_folder) if config.api_keys_folder else None),
        previews=Previews(videos.store, timeout_s=config.preview_timeout_s),
        pools=Pools(pools or {}),
    )
    app.include_router(probe_routes)
    of_videos = (video_routes, remix_routes, content_routes, stream_routes, event_routes)
    for routes in (model_routes, status_routes, *of_videos):
        app.include_router(routes, dependencies=[Depends(check_key)])
    add_page(app)
    add_error_handlers(app)
    add_guards(app, allowed_hosts=config.allowed_hosts, cors=config.cors)
    docs.complete(app, videos.models, needs_key=config.needs_key)
    return app
