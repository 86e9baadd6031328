"""The app: every deployment with its options, bound together from one typed configuration.

``build`` is what ``serve_config.yaml`` names; see ``config`` for what it may say.
"""

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.claims.deployment import Claims
from deployments.config import AppConfig, ModelOptions, PoolOptions
from deployments.http.ingress import Ingress
from deployments.orchestrator.deployment import Orchestrator
from deployments.pools.decoder import Decoder
from deployments.pools.denoiser import Denoiser
from deployments.pools.denoiser_with_decoder import DenoiserWithDecoder
from deployments.pools.text_encoder import TextEncoder
from pyramid_serve.families import Family, family_of
from pyramid_serve.served_model import ServedModel, ServedModels

_STICKY = RequestRouterConfig.model_validate(
    {"request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"}
)
_HEALTH_CHECK_PERIOD_S = 3.0
"""Serve replaces a replica after three bad answers: a device that failed must be gone before calls give up retrying."""


def build(args: AppConfig) -> Application:
    """The app of one configuration. Raises ``CheckpointError`` for a model that is not there."""
    models = ServedModels(tuple(_served(model, args) for model in args.models))
    text_encoders, denoisers, decoders = {}, {}, {}
    for options, model in zip(args.models, models.models, strict=True):
        # The first model's deployments keep their names when others are added, so its replicas need not be replaced.
        suffix = "" if model is models.models[0] else f"-{options.deployment_suffix}"
        text_encoders[model.name] = _text_encoder(options, suffix)
        denoisers[model.name], decoders[model.name] = _denoiser_and_decoder(options, model.family, suffix)
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
        serve.deployment(Orchestrator),
        max_ongoing_requests=100_000,  # those who wait must not keep out the calls that make what they wait for
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(
        args.storage_root,
        args.orchestrator.settings,
        models,
        claims=claims,
        text_encoders=text_encoders,
        denoisers=denoisers,
        decoders=decoders,
    )
    ingress: Application = args.ingress.apply(
        Ingress,
        max_ongoing_requests=100_000,  # requests past a limit of Serve's would wait, the probes too; see HttpConfig's
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(
        args.storage_root,
        args.ingress.settings,
        models,
        claims=claims,
        orchestrator=orchestrator,
        pools={name: _pools(text_encoders[name], denoisers[name], decoders[name]) for name in models.names},
    )
    return ingress


def _pools(text_encoder: Application, denoiser: Application, decoder: Application) -> dict[str, Application]:
    """The deployments of a model by part; a decoder that is the denoiser too is named once."""
    pools = {"text_encoder": text_encoder, "denoiser": denoiser}
    return pools if decoder is denoiser else {**pools, "decoder": decoder}


def _served(options: ModelOptions, args: AppConfig) -> ServedModel:
    family = family_of(options.source, options.family)
    options.check_options(family)
    return ServedModel(options.public_name, family, family.capabilities(options.source, options.variant), args.limits)


def _text_encoder(options: ModelOptions, suffix: str) -> Application:
    return options.text_encoder.apply(
        serve.deployment(TextEncoder),
        name=f"TextEncoder{suffix}",
        max_ongoing_requests=64,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(options.text_encoder_config)


def _denoiser_and_decoder(options: ModelOptions, family: Family, suffix: str) -> tuple[Application, Application]:
    """Both, which are the same where decoding runs in the denoiser's replicas."""
    # A video's units go to the replica that has the memory of those before.
    router = {"request_router_config": _STICKY} if family.decodes_in_order else {}
    if not isinstance(options.decoder, PoolOptions):
        both = options.denoiser.apply(
            serve.deployment(DenoiserWithDecoder),
            name=f"Denoiser{suffix}",
            max_ongoing_requests=64,
            health_check_period_s=_HEALTH_CHECK_PERIOD_S,
            graceful_shutdown_timeout_s=600.0,
            ray_actor_options={"num_cpus": 0.4},
            **router,
        ).bind(options.denoiser_config, options.decoder_config)
        return both, both
    denoiser = options.denoiser.apply(
        serve.deployment(Denoiser),
        name=f"Denoiser{suffix}",
        max_ongoing_requests=16,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=600.0,
        ray_actor_options={"num_cpus": 0.4},
    ).bind(options.denoiser_config)
    decoder = options.decoder.apply(
        serve.deployment(Decoder),
        name=f"Decoder{suffix}",
        max_ongoing_requests=64,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=120.0,
        ray_actor_options={"num_cpus": 0.3},
        **router,
    ).bind(options.decoder_config)
    return denoiser, decoder
