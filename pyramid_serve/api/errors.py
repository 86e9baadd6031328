"""What is wrong with a request."""

from typing import Any

from pyramid_serve.errors import InputError

MODEL_NOT_FOUND = "model_not_found"


class RequestError(InputError):
    """A request that cannot be met. ``param`` names the field; the message says what came and what is allowed.

    ``code`` lets programs tell apart what is more than a wrong value, such as ``MODEL_NOT_FOUND``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _request_error, (str(self), self.param, self.code)


def _request_error(message: str, param: str | None, code: str | None) -> RequestError:
    return RequestError(message, param=param, code=code)


def unknown_model(asked: str, *served: str) -> RequestError:
    """The error of a request for a model that is not among those served."""
    names = ", ".join(map(repr, served))
    return RequestError(f"model={asked[:60]!r}: this server has {names}", param="model", code=MODEL_NOT_FOUND)
