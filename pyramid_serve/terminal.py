"""Untrusted text on a terminal: prompts, ids and errors of a server may hold what a terminal takes for commands."""

import unicodedata

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls (such as ESC), formats (bidirectional overrides), surrogates, line separators."""
_JOINERS = "\u200c\u200d"
"""Formats that scripts and emoji need and that reorder nothing."""
_REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """The text on one line and without anything that controls a terminal or reorders what it shows.

    White space such as a line break becomes a space, any other control or format character U+FFFD.
    """
    return "".join(map(_printable_character, text))


def printable_lines(text: str) -> str:
    """``printable`` for each line; the lines stay."""
    return "\n".join(map(printable, text.split("\n")))


def _printable_character(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if character.isspace():
        return " "
    return _REPLACEMENT if unicodedata.category(character) in _UNPRINTABLE else character
