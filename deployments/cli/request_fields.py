"""The fields of a request for a video, from the arguments of ``submit``."""

import argparse
from typing import Any


def request_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, without the picture. The server checks them."""
    from pyramid_serve.api import VideoRequest

    names = VideoRequest.model_fields.keys() - {"input_reference"}
    return {name: value for name, value in vars(arguments).items() if name in names}
