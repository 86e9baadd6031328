"""What people are told of a prompt that is longer than the text encoder reads."""


def truncation_note(prompt: str, truncated_at: int) -> str:
    """A sentence that says where a prompt was cut, with the words around the place.

    prompt: as it was encoded, with its suffix; truncated_at: the character at which the text encoder stopped reading.
    """
    read, unread = prompt[:truncated_at], prompt[truncated_at:]
    return (
        f"the prompt is longer than the text encoder reads: it stopped at character {truncated_at} of {len(prompt)}, "
        f"between {read[-30:]!r} and {unread[:30]!r}; what comes after has no effect"
    )
