"""What can go wrong: errors that are raised in one room and caught in another."""


class InputError(ValueError):
    """What the user gave cannot be used, and only the user can change that; the message is meant for them.

    A video ends with it at once, while any other error is one of the server, after which it is tried again.
    """


class NonFiniteError(ValueError):
    """Latents, frames or embeddings hold NaN or infinity, so a video of them would be wrong. The message says where."""


class VideoNotFoundError(LookupError):
    """There is no such video, or it was deleted."""
