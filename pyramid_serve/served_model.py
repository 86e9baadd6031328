"""A model under a public name: what it offers, and the plan of a request for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from pyramid_serve.api.errors import RequestError, unknown_model
from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer
from pyramid_serve.api.plans import Plan
from pyramid_serve.api.requests import VideoRequest, drawn_seed, request_error
from pyramid_serve.families import Family

_TEXTS = ("prompt", "negative_prompt", "prompt_suffix")


@dataclass(frozen=True)
class ServedModel:
    """A model: its public name, its family, what it can do, and the limits on requests for it."""

    name: str
    family: Family
    capabilities: Any
    limits: RequestLimits

    @cached_property
    def offer(self) -> Offer:
        return self.family.offer(self.capabilities, self.limits)

    @property
    def known_fields(self) -> list[str]:
        """The names of all fields that a request for this model may have."""
        return [*VideoRequest.model_fields, *self.family.request_fields.model_fields]

    def plan(self, request: VideoRequest) -> Plan:
        """The plan of a request for this model; its seed is drawn where none is given.

        Values that are left out are the model's own, cut to the limits. Raises ``RequestError`` for what the model
        cannot make or the limits refuse.
        """
        self._check(request)
        return self.family.plan(
            request,
            self._family_fields(request.family_fields),
            model=self.name,
            capabilities=self.capabilities,
            limits=self.limits,
        )

    def replan(self, plan: Plan, request: VideoRequest) -> Plan:
        """The plan of another video of this model, with another prompt and the rest as in ``plan``.

        The seed is another one where ``request`` names it: as given, or drawn for -1. Raises ``RequestError`` as
        ``plan`` does.
        """
        self._check(request)
        changes: dict[str, Any] = {"prompt": request.prompt}
        if "seed" in request.model_fields_set:
            changes["seed"] = drawn_seed() if request.seed is None else request.seed
        return plan.model_copy(update=changes)

    def _family_fields(self, given: Mapping[str, Any]) -> Any:
        """The family's fields of a request, checked. Raises ``RequestError`` for one that is wrong or unknown."""
        try:
            return self.family.request_fields.model_validate(dict(given))
        except ValidationError as error:
            raise request_error(error, given, known=self.known_fields) from None

    def _check(self, request: VideoRequest) -> None:
        if request.model is not None and request.model != self.name:
            raise unknown_model(request.model, self.name)
        for name in _TEXTS:
            text: str | None = getattr(request, name)
            if text is not None and len(text) > self.limits.max_prompt_characters:
                raise RequestError(
                    f"{name}: {len(text)} characters, at most {self.limits.max_prompt_characters}", param=name
                )
        picture = request.input_reference
        if picture is not None and len(picture) > self.limits.max_picture_bytes:
            raise RequestError(
                f"input_reference: {len(picture)} bytes, at most {self.limits.max_picture_bytes}",
                param="input_reference",
            )
        if request.fps is not None and request.fps != self.offer.fps:
            raise RequestError(
                f"fps={request.fps:g}: must be {self.offer.fps}, which is what the model makes", param="fps"
            )


@dataclass(frozen=True)
class ServedModels:
    """The models of a server. The first is the one of requests that name none."""

    models: tuple[ServedModel, ...]

    def __post_init__(self) -> None:
        """``ValueError`` for no model, or two of the same name."""
        if not self.models or len(set(self.names)) < len(self.models):
            raise ValueError(f"models={self.names}: give at least one, and each a name of its own")

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    @property
    def fields_with_several_values(self) -> frozenset[str]:
        """The request fields of any of these models that may be lists."""
        return frozenset().union(*(model.offer.fields_with_several_values for model in self.models))

    def choose(self, name: str | None) -> ServedModel:
        """The model of this name, or the first for None. Raises ``RequestError`` for one that is not served."""
        if name is None:
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        raise unknown_model(name, *self.names)
