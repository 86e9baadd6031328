"""The field ``input_reference``: a picture as a base64 data URL. As a file it only comes in a form."""

import base64
import binascii

from deployments.http.errors import ApiError

PICTURE_FIELD = "input_reference"


def picture_of_object(value: object) -> bytes:
    """The bytes of the picture in ``{"image_url": data URL}``. ``ApiError`` 400 for any other value."""
    if not isinstance(value, dict):
        raise picture_error(f"must be {{'image_url': data URL}}, not {_name_of(value)}; files come in a form")
    unknown = sorted(value.keys() - {"image_url"})
    if unknown:
        raise picture_error(f"{unknown[0][:60]!r} is unknown, only image_url is taken")
    if not isinstance(value.get("image_url"), str):
        raise picture_error(f"image_url must be a data URL, not {_name_of(value.get('image_url'))}")
    return picture_of_url(value["image_url"])


def picture_of_url(url: str) -> bytes:
    """The bytes in a base64 data URL. ``ApiError`` 400 for any other URL: nothing is fetched from elsewhere."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise picture_error(f"image_url={url[:40]!r}: must be a data URL; nothing is fetched from elsewhere")
    kind, comma, content = rest.partition(",")
    if not comma or not kind.lower().startswith("image/") or not kind.lower().endswith(";base64"):
        raise picture_error(f"image_url={url[:40]!r}: must be like data:image/png;base64,iVBORw0...")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise picture_error(f"image_url: not valid base64: {error}") from None


def picture_error(message: str) -> ApiError:
    """400 for a picture that cannot be read."""
    return ApiError(400, f"{PICTURE_FIELD}: {message}", param=PICTURE_FIELD)


def _name_of(value: object) -> str:
    names = {type(None): "null", str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
