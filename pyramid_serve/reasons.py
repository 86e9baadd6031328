"""What people are told about an error that a library raised."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its class where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
