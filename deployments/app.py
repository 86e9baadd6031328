"""The app: every deployment with its options, bound together from one typed configuration.

``build`` is what ``serve_config.yaml`` names; ``load_config`` reads such a file and refuses every key that nothing
would read, which Serve itself does not.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Deployment
from ray.serve.schema import ServeDeploySchema

from deployments.claims.config import ClaimsConfig
from deployments.claims.deployment import Claims
from deployments.http.config import HttpConfig
from deployments.http.ingress import Ingress
from deployments.orchestrator.attempt import RunConfig
from deployments.orchestrator.deployment import Orchestrator
from deployments.pools.decoder import Decoder, DecoderConfig
from deployments.pools.denoiser import Denoiser, DenoiserConfig
from deployments.pools.model_config import ModelConfig
from deployments.pools.text_encoder import TextEncoder, TextEncoderConfig
from deployments.videos.videos import ServedModel
from pyramid_serve.api import RequestLimits
from pyramid_serve.checkpoints import capabilities
from pyramid_serve.precision import DTypeName

IMPORT_PATH = "deployments.app:build"
_STICKY = RequestRouterConfig.model_validate(
    {"request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"}
)
_HEALTH_CHECK_PERIOD_S = 3.0
"""Serve replaces a replica after three bad answers: a device that failed must be gone before calls give up retrying."""
_FORBID = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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


class ModelOptions(BaseModel):
    """Which model is served, and how it is called."""

    model_config = _FORBID

    source: str = "shapes"
    """A local folder, an fsspec URL, a Hub id, or the name of a model that comes with the package."""
    variant: str | None = None
    dtype: DTypeName | None = None
    """What every part of the model is computed in. None: what suits each deployment's device, see
    ``precision.suitable_dtype``.
    """
    name: str | None = None
    """As clients see it. None: the last part of ``source``."""

    @property
    def public_name(self) -> str:
        return self.name or self.source.rstrip("/").rpartition("/")[2].partition("@")[0]


class AppConfig(BaseModel):
    """The arguments of the app."""

    model_config = _FORBID

    model: ModelOptions = ModelOptions()
    storage: str = "outputs"
    """Where videos are kept: a local folder that every node sees, or an fsspec URL."""
    limits: RequestLimits = RequestLimits()
    text_encoder: PoolOptions = PoolOptions()
    denoiser: PoolOptions = PoolOptions()
    decoder: PoolOptions = PoolOptions()
    orchestrator: OrchestratorOptions = OrchestratorOptions()
    claims: ClaimsOptions = ClaimsOptions()
    ingress: IngressOptions = IngressOptions()

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        _ = self.text_encoder_config, self.denoiser_config, self.decoder_config
        return self

    @property
    def text_encoder_config(self) -> TextEncoderConfig:
        return TextEncoderConfig(**self._pool_settings("text_encoder", self.text_encoder, TextEncoderConfig))

    @property
    def denoiser_config(self) -> DenoiserConfig:
        return DenoiserConfig(**self._pool_settings("denoiser", self.denoiser, DenoiserConfig))

    @property
    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig(**self._pool_settings("decoder", self.decoder, DecoderConfig))

    @property
    def storage_root(self) -> str:
        """``storage``, as every replica finds it: they do not share a working directory."""
        return self.storage if "://" in self.storage else str(Path(self.storage).absolute())

    def _pool_settings(self, name: str, pool: PoolOptions, config: type[ModelConfig]) -> dict[str, Any]:
        for field in ("source", "variant", "dtype"):
            if field in pool.settings:
                raise ValueError(f"{name}.settings.{field}: set model.{field}, for all deployments alike")
        fields = {**self.model.model_dump(include={"source", "variant", "dtype"}), **pool.settings}
        try:
            config.model_validate(fields)
        except ValidationError as error:
            raise ValueError("; ".join(_problems(error, f"{name}.settings."))) from None
        return fields


def build(args: AppConfig) -> Application:
    """The app of one configuration. Raises ``CheckpointError`` for a model that is not there."""
    model = ServedModel(args.model.public_name, capabilities(args.model.source, args.model.variant), args.limits)
    text_encoder = args.text_encoder.apply(
        TextEncoder,
        max_ongoing_requests=64,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(args.text_encoder_config)
    denoiser = args.denoiser.apply(
        Denoiser,
        max_ongoing_requests=16,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=600.0,
        ray_actor_options={"num_cpus": 0.4},
    ).bind(args.denoiser_config)
    decoder = args.decoder.apply(
        Decoder,
        max_ongoing_requests=64,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=120.0,
        ray_actor_options={"num_cpus": 0.3},
        request_router_config=_STICKY,
    ).bind(args.decoder_config)
    claims = args.claims.apply(
        serve.deployment(Claims),
        num_replicas=1,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        logging_config={"enable_access_log": False},  # it hears of every video each second
        ray_actor_options={"num_cpus": 0.0},
    ).bind(args.storage_root, args.claims.settings)
    orchestrator = args.orchestrator.apply(
        Orchestrator,
        max_ongoing_requests=100_000,  # those who wait must not keep out the calls that make what they wait for
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(
        args.storage_root,
        args.orchestrator.settings,
        model,
        claims=claims,
        text_encoder=text_encoder,
        denoiser=denoiser,
        decoder=decoder,
    )
    ingress: Application = args.ingress.apply(
        Ingress,
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(args.storage_root, args.ingress.settings, model, claims=claims, orchestrator=orchestrator)
    return ingress


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
            raise ConfigError(_lines(path, _problems(error))) from None
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
        return list(_problems(error, prefix))
    return []


def _problems(error: ValidationError, prefix: str = "") -> Iterator[str]:
    for problem in error.errors():
        where = prefix + ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
        else:
            yield f"{where.rstrip('.')}: {problem['msg'].removeprefix('Value error, ')}"


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
