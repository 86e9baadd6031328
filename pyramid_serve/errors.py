"""What can go wrong: errors that are raised in one room and caught in another."""


class NonFiniteError(ValueError):
    """Latents, frames or embeddings hold NaN or infinity, so a video of them would be wrong. The message says where."""


class VideoNotFoundError(LookupError):
    """There is no such video, or it was deleted."""
