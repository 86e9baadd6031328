"""The app's configuration: typed, and read from files in which every key is checked.

``load_config`` reads a file such as ``serve_config.yaml`` and refuses every key that nothing would read, which Serve
itself does not.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import Deployment
from ray.serve.schema import ServeDeploySchema

from deployments.claims.config import ClaimsConfig
from deployments.http.config import HttpConfig
from deployments.orchestrator.attempt import RunConfig
from deployments.pools.decoder import DecoderConfig
from deployments.pools.denoiser import DenoiserConfig
from deployments.pools.model_config import ModelConfig
from deployments.pools.text_encoder import TextEncoderConfig
from pyramid_serve.api import RequestLimits
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.families import Family, imported, known_families

IMPORT_PATH = "deployments.app:build"

PoolConfig = TypeVar("PoolConfig", bound=ModelConfig)

# The input is hidden because an error is printed and logged, and some of the input is secret.
_FORBID = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)
_POOLS = ("text_encoder", "denoiser", "decoder")
_OF_ONE_MODEL = ("model", *_POOLS)
"""The keys that earlier releases had at the top, when an app had one model."""


class ConfigError(ValueError):
    """A configuration file that cannot be used; each line of the message names a key and what is wrong with it."""


class ActorOptions(BaseModel):
    """What one replica takes of its node, and on which nodes it may be. ``num_gpus`` may be a fraction."""

    model_config = _FORBID

    num_cpus: Annotated[float, Field(ge=0)] | None = None
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    memory: Annotated[float, Field(ge=0)] | None = None
    """Bytes."""
    resources: dict[str, float] | None = None
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    """Labels of the node pool, for example ``{"pool": "denoiser"}``."""
    runtime_env: dict[str, Any] | None = None


class DeploymentOptions(BaseModel):
    """Options of one deployment, with the names that Serve gives them. What is left out is the app's default."""

    model_config = _FORBID

    num_replicas: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    autoscaling_config: dict[str, Any] | None = None
    """The fields of Serve's ``AutoscalingConfig``; ``min_replicas: 0`` scales to zero."""
    ray_actor_options: ActorOptions = ActorOptions()
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    max_queued_requests: Annotated[int, Field(ge=-1)] | None = None
    """Of one caller; -1 is no limit."""
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] | None = None
    """A replica that goes has so long to end its calls; then they are made again elsewhere."""
    graceful_shutdown_wait_loop_s: Annotated[float, Field(ge=0)] | None = None
    health_check_period_s: Annotated[float, Field(gt=0)] | None = None
    health_check_timeout_s: Annotated[float, Field(gt=0)] | None = None
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.autoscaling_config is None:
            return self
        if self.num_replicas is not None:
            raise ValueError("num_replicas and autoscaling_config: give one of them")
        unknown = list(_unknown_keys(self.autoscaling_config, AutoscalingConfig, "autoscaling_config"))
        if unknown:
            raise ValueError("; ".join(unknown))
        AutoscalingConfig(**self.autoscaling_config)
        return self

    def apply(self, deployment: Any, **defaults: Any) -> Deployment:
        """The deployment with ``defaults`` and, before these, what is set here."""
        own = self.model_dump(exclude_none=True, exclude={"settings"})
        actor_options = {**defaults.pop("ray_actor_options", {}), **own.pop("ray_actor_options")}
        if "autoscaling_config" in own:
            defaults.pop("num_replicas", None)
        options: Deployment = deployment.options(**{**defaults, **own}, ray_actor_options=actor_options)
        return options


class PoolOptions(DeploymentOptions):
    """Options of a deployment that holds a part of the model."""

    settings: dict[str, Any] = {}
    """The deployment's own: the fields of its configuration class but for the model."""


class ClaimsOptions(DeploymentOptions):
    """Claims is one replica, always."""

    num_replicas: Literal[1] | None = None
    autoscaling_config: None = None
    settings: ClaimsConfig = ClaimsConfig()


class OrchestratorOptions(DeploymentOptions):
    settings: RunConfig = RunConfig()


class IngressOptions(DeploymentOptions):
    settings: HttpConfig = HttpConfig()


class SharedPool(BaseModel):
    """Decoding in the denoiser's replicas: ``with denoiser`` for short."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    with_: Annotated[Literal["denoiser"], Field(alias="with")] = "denoiser"
    settings: dict[str, Any] = {}
    """As those of a decoder with a pool of its own; ``device`` and ``num_threads`` are the denoiser's."""


def _shared_for_short(value: Any) -> Any:
    if isinstance(value, str):
        pool, _, name = value.partition(" ")
        return {pool: name}
    return value


def _tag_of(value: Any) -> str:
    is_shared = isinstance(value, SharedPool) or (isinstance(value, Mapping) and "with" in value)
    return _SHARED.tag if is_shared else _OWN.tag


_OWN, _SHARED = Tag("its own pool"), Tag("another's pool")
_TAGS = (_OWN.tag, _SHARED.tag)
OwnOrShared = Annotated[
    Annotated[PoolOptions, _OWN] | Annotated[SharedPool, _SHARED],
    Discriminator(_tag_of),
    BeforeValidator(_shared_for_short),
]


class ModelOptions(BaseModel):
    """A model: where it comes from, how it is called, and its three pools."""

    model_config = _FORBID

    source: str = "shapes"
    """A local folder, an fsspec URL, a Hub id, or the name of a model that comes with the package."""
    variant: str | None = None
    family: str | None = None
    """The import path of the model's family, such as ``my_package.my_family:FAMILY``. None: the family that recognises
    the checkpoint's own files.
    """
    dtype: DTypeName | None = None
    """What every part of the model is computed in. None: what suits each deployment's device, see
    ``precision.suitable_dtype``.
    """
    name: str | None = None
    """As clients see it. None: the last part of ``source``."""
    text_encoder: PoolOptions = PoolOptions()
    denoiser: PoolOptions = PoolOptions()
    decoder: OwnOrShared = PoolOptions()
    """``with denoiser``: decoding runs in the denoiser's replicas, for models where it is a small part of the work."""

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        _ = self.text_encoder_config, self.denoiser_config, self.decoder_config
        return self

    @property
    def public_name(self) -> str:
        return self.name or self.source.rstrip("/").rpartition("/")[2].partition("@")[0]

    @property
    def deployment_suffix(self) -> str:
        """What tells this model's deployments from those of others, in characters that a deployment may have."""
        return re.sub(r"[^A-Za-z0-9_.-]", "-", self.public_name)

    @property
    def text_encoder_config(self) -> TextEncoderConfig:
        return self._pool_config("text_encoder", self.text_encoder, TextEncoderConfig)

    @property
    def denoiser_config(self) -> DenoiserConfig:
        return self._pool_config("denoiser", self.denoiser, DenoiserConfig)

    @property
    def decoder_config(self) -> DecoderConfig:
        """With the denoiser it has its device and threads."""
        if isinstance(self.decoder, PoolOptions):
            return self._pool_config("decoder", self.decoder, DecoderConfig)
        shared = {key: value for key, value in self.denoiser.settings.items() if key in ("device", "num_threads")}
        for field in sorted({"device", "num_threads"} & self.decoder.settings.keys()):
            raise ValueError(f"decoder.settings.{field}: is the denoiser's, with whom it runs; set it there")
        settings = {**self.decoder.settings, **shared}
        return self._pool_config("decoder", PoolOptions(settings=settings), DecoderConfig)

    def check_options(self, family: Family) -> None:
        """``ValueError`` for settings of the pools that this family, the model's own, does not have."""
        _check_options("denoiser", self.denoiser_config.options, DenoiserConfig, [family])
        _check_options("decoder", self.decoder_config.options, DecoderConfig, [family])

    def _pool_config(self, name: str, pool: PoolOptions, config: type[PoolConfig]) -> PoolConfig:
        of_model = {"source", "variant", "family", "dtype"}
        for field in sorted(of_model & pool.settings.keys()):
            raise ValueError(f"{name}.settings.{field}: set the model's {field}, for all its deployments alike")
        own = {key: value for key, value in pool.settings.items() if key in config.model_fields and key != "options"}
        options = {key: value for key, value in pool.settings.items() if key not in own}
        _check_options(name, options, config, [imported(self.family)] if self.family else known_families())
        try:
            return config.model_validate({**self.model_dump(include=of_model), **own, "options": options})
        except ValidationError as error:
            raise ValueError("; ".join(problems_of(error, f"{name}.settings."))) from None


def _check_options(name: str, options: Mapping[str, Any], config: type[ModelConfig], families: list[Family]) -> None:
    """``ValueError`` for settings that are not the deployment's own, unless they are options of one of the families."""
    problems: list[str] = []
    for family in families:
        kinds = {DenoiserConfig: family.denoise_options, DecoderConfig: family.decode_options}
        kind = kinds.get(config, _NoOptions)
        try:
            kind.model_validate(dict(options))
            return
        except ValidationError as error:
            problems = problems or list(problems_of(error, f"{name}.settings."))
    raise ValueError("; ".join(problems))


class _NoOptions(BaseModel):
    model_config = _FORBID


class AppConfig(BaseModel):
    """The arguments of the app."""

    model_config = _FORBID

    models: tuple[ModelOptions, ...] = (ModelOptions(),)
    """The models served; the first is the one of requests that name none."""
    storage: str = "outputs"
    """Where videos are kept: a local folder that every node sees, or an fsspec URL."""
    limits: RequestLimits = RequestLimits()
    orchestrator: OrchestratorOptions = OrchestratorOptions()
    claims: ClaimsOptions = ClaimsOptions()
    ingress: IngressOptions = IngressOptions()

    @model_validator(mode="before")
    @classmethod
    def _of_one_model(cls, fields: Any) -> Any:
        """Take the layout of earlier releases: ``model`` at the top, and its pools beside it."""
        if not isinstance(fields, Mapping) or not is_of_one_model(fields):
            return fields
        if "models" in fields:
            given = next(key for key in _OF_ONE_MODEL if key in fields)
            raise ValueError(f"{given}: is part of each of the models; give it there")
        model = fields.get("model", {})
        if isinstance(model, BaseModel):
            model = model.model_dump(exclude_unset=True)
        if not isinstance(model, Mapping):
            raise ValueError("model: must be a mapping")
        pools = {key: fields[key] for key in _POOLS if key in fields}
        others = {key: value for key, value in fields.items() if key not in _OF_ONE_MODEL}
        return {**others, "models": [{**model, **pools}]}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.models:
            raise ValueError("models: give at least one")
        suffixes = [model.deployment_suffix for model in self.models]
        for index, suffix in enumerate(suffixes):
            if suffix in suffixes[:index]:
                name, other = self.models[index].public_name, self.models[suffixes.index(suffix)].public_name
                alike = "is" if name == other else "is as a deployment's name the same as"
                raise ValueError(f"models.{index}.name: {name!r} {alike} {other!r}, another model's; give it another")
        return self

    @property
    def storage_root(self) -> str:
        """``storage``, as every replica finds it: they do not share a working directory."""
        return self.storage if "://" in self.storage else str(Path(self.storage).absolute())


def is_of_one_model(fields: Mapping[str, Any]) -> bool:
    """Whether arguments have the layout of earlier releases, which had one model."""
    return any(key in fields for key in _OF_ONE_MODEL)


# --- configuration files --------------------------------------------------------------------------------------------


def load_config(path: str | Path) -> dict[str, Any]:
    """A Serve configuration file as ``serve.schema.ServeDeploySchema`` takes it, every key of it checked.

    Raises ``ConfigError`` naming all keys that are unknown, and values that do not fit.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with a list of applications")
    problems = list(_unknown_keys(content, ServeDeploySchema, ""))
    if not problems:
        try:
            schema = ServeDeploySchema.model_validate(content)
        except ValidationError as error:
            raise ConfigError(_lines(path, problems_of(error))) from None
        for index, application in enumerate(schema.applications):
            if application.import_path == IMPORT_PATH:
                problems += _app_problems(application.args, f"applications.{index}.args.")
    if problems:
        raise ConfigError(_lines(path, problems))
    return content


def app_config(content: Mapping[str, Any]) -> AppConfig:
    """The arguments of the first application of a file that ``load_config`` has read."""
    return AppConfig.model_validate(content["applications"][0].get("args", {}))


def _app_problems(args: Mapping[str, Any], prefix: str) -> list[str]:
    try:
        AppConfig.model_validate(args)
    except ValidationError as error:
        problems = list(problems_of(error, prefix))
        return [_in_layout_of_one_model(problem) for problem in problems] if is_of_one_model(args) else problems
    return []


def _in_layout_of_one_model(problem: str) -> str:
    """A problem with the first of the models, named as in a file that has ``model`` and its pools at the top."""
    return re.sub(r"models\.0(?=[.:])", "model", re.sub(rf"models\.0\.(?={'|'.join(_POOLS)})", "", problem))


def problems_of(error: ValidationError, prefix: str = "") -> Iterator[str]:
    """Each problem of a failed validation as a line that begins with its key."""
    for problem in error.errors():
        where = prefix + ".".join(str(part) for part in problem["loc"] if part not in _TAGS)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
        elif where and re.match(r"[\w.]+: ", message):  # it names the key within what was validated
            yield f"{where.rstrip('.')}.{message}"
        else:
            yield f"{where.rstrip('.')}: {message}"


def _unknown_keys(content: Any, model: type[BaseModel], where: str) -> Iterator[str]:
    """The keys, at any depth, that a model would not read."""
    if not isinstance(content, Mapping):
        return  # the model's own validation says what is wrong with it
    for key, value in content.items():
        at = f"{where}.{key}" if where else str(key)
        field = model.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(model.model_fields)}"
            yield f"{at}: unknown key; {known}"
            continue
        for inner in _models_in(field.annotation):
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, item in items:
                yield from _unknown_keys(item, inner, at if index is None else f"{at}.{index}")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic model that a field's annotation leads to, if it leads to one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _lines(path: Path, problems: Iterator[str] | list[str]) -> str:
    return "\n".join(f"{path}: {problem}" for problem in problems)
