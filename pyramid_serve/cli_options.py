"""Options of the command line that come from what models can do: a request's fields, and a family's own options."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pyramid_serve.api.requests import VideoRequest, parse_request, request_error
from pyramid_serve.families import CommandLineOption, Family

_GIVEN = "given_to_families"
"""Where the namespace has the values of ``--set``."""
_WITH_OPTIONS = frozenset(
    ("prompt", "model", "input_reference", "seconds", "size", "seed", "negative_prompt", "prompt_suffix")
)


def add_request_options(parser: argparse.ArgumentParser, families: Sequence[Family]) -> None:
    """The options that make a request, the same in this process and for a server. Values are checked later."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture that the video is made from")
    parser.add_argument("--seconds", metavar="S", help="brought to the nearest length that can be made")
    parser.add_argument("--size", metavar="WxH", help="in pixels")
    parser.add_argument(
        "--seed", metavar="N", help="the same seed gives the same video; drawn unless given, and for -1"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--prompt-suffix", metavar="TEXT", help="added to the prompt")
    parser.add_argument(
        "--set",
        dest=_GIVEN,
        action="append",
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="any other field of the model's requests; /v1/models of a server lists them",
    )
    _add_options(parser, "request fields", [(family, family.request_fields) for family in families])


def add_pipeline_options(parser: argparse.ArgumentParser, families: Sequence[Family]) -> None:
    """The options that a family has for a model in this process."""
    _add_options(parser, "loading", [(family, family.pipeline_options) for family in families])


def request_fields_from(arguments: argparse.Namespace, families: Sequence[Family]) -> dict[str, Any]:
    """The fields of a request that were given, with the prompt and without the picture."""
    names = VideoRequest.model_fields.keys() - {"input_reference"}
    names |= {name for family in families for name in family.request_fields.model_fields}
    fields = {name: value for name, value in vars(arguments).items() if name in names}
    return fields | dict(vars(arguments).get(_GIVEN) or [])


def request_from(arguments: argparse.Namespace, families: Sequence[Family]) -> VideoRequest:
    """The request that the options make, with the file of its picture; the model is left out.

    Raises ``RequestError`` naming what is wrong, and ``ValueError`` for a picture that cannot be read.
    """
    fields = request_fields_from(arguments, families)
    fields.pop("model", None)
    image: Path | None = vars(arguments).get("image")
    if image is not None:
        try:
            fields["input_reference"] = image.read_bytes()
        except OSError as error:
            raise ValueError(f"{image}: cannot be read: {error.strerror}") from None
    return parse_request(fields)


def pipeline_options_from(arguments: argparse.Namespace, family: Family, families: Sequence[Family]) -> BaseModel:
    """The options of a family's pipeline that were given. Raises ``ValueError`` for one that it does not have."""
    names = {name for one in families for name in one.pipeline_options.model_fields}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    flags = {name: option.flag for one in families for name, option in options_in(one.pipeline_options)}
    for name in given:
        if name not in family.pipeline_options.model_fields:
            raise ValueError(f"{flags.get(name, name)}: a model of {family.title} has no such option")
    try:
        return family.pipeline_options.model_validate(given)
    except ValidationError as error:
        raise request_error(error, given, known=family.pipeline_options.model_fields) from None


def options_in(fields: type[BaseModel]) -> Iterator[tuple[str, CommandLineOption]]:
    """The fields of a model that have an option, by name."""
    for name, field in fields.model_fields.items():
        for item in field.metadata:
            if isinstance(item, CommandLineOption):
                yield name, item


def _add_options(
    parser: argparse.ArgumentParser, what: str, of_families: Sequence[tuple[Family, type[BaseModel]]]
) -> None:
    """A group for each family. An option that several have is in the group of the first."""
    added: set[str] = set()
    for family, fields in of_families:
        group = parser.add_argument_group(f"{family.title}, {what}")
        for name, option in options_in(fields):
            if name in added:
                continue
            added.add(name)
            more: Mapping[str, Any] = {}
            if option.without_value is not None:
                more = {"nargs": "?", "const": option.without_value}
            choices = _choices(fields.model_fields[name].annotation)
            shown = {"choices": choices} if choices else {"metavar": option.metavar}
            group.add_argument(option.flag, dest=name, help=option.help.replace("%", "%%"), **shown, **more)


def _choices(annotation: Any) -> list[str]:
    """The words that a field may have as its value; none if it may have other values."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) for word in _choices(inner)]


def _name_and_value(text: str) -> tuple[str, Any]:
    """A field and its value: text, or JSON where it is a list or an object."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: must be NAME=VALUE")
    if name in _WITH_OPTIONS:
        raise argparse.ArgumentTypeError(f"{name} has an option or a place of its own")
    if not value.startswith(("[", "{")):
        return name, value  # numbers may come as text
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: not valid JSON") from None
