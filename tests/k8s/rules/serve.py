"""The Serve configuration of a RayService: every key is known, and every replica has a place that it fits."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml
from ray.serve import Application
from ray.serve.deployment import Deployment

from deployments.app import build
from deployments.config import AppConfig, ConfigError, ModelOptions, app_config, load_config
from tests.k8s.manifests_at_hand import Group, Manifests
from tests.k8s.rules.memory import GB, gpu_bytes, host_bytes

_API_KEYS = "/etc/pyramid-serve/api-keys"


@dataclass(frozen=True)
class Placed:
    """A deployment: what each of its replicas takes, and how many there may be."""

    name: str
    model: ModelOptions | None
    """None for those that compute nothing."""
    pool: str | None
    num_cpus: float
    num_gpus: float
    max_replicas: int
    max_per_node: int
    graceful_shutdown_s: float
    downscale_delay_s: float | None

    @property
    def role(self) -> str:
        """The name without that of the model."""
        return self.name.partition("-")[0]


@dataclass
class Pod:
    """A pod that replicas are put into."""

    group: Group
    replicas: list[Placed] = field(default_factory=list)

    def takes(self, replica: Placed) -> bool:
        """Put the replica here if it fits."""
        cpus = sum(each.num_cpus for each in self.replicas) + replica.num_cpus
        gpus = sum(each.num_gpus for each in self.replicas) + replica.num_gpus
        is_full = cpus > self.group.limit("cpu") + 1e-9 or gpus > self.group.limit("nvidia.com/gpu") + 1e-9
        if is_full or self.replicas.count(replica) >= replica.max_per_node:
            return False
        self.replicas.append(replica)
        return True


def problems(manifests: Manifests) -> Iterator[str]:
    text = manifests.service["spec"].get("serveConfigV2")
    if not text:
        yield "there is no Serve configuration"
        return
    unread = reading_problems(text)
    yield from unread
    if unread:
        return
    yield from _proxy_problems(manifests)
    config = app_config(manifests.serve_config)
    if config.ingress.settings.api_keys:
        yield "a secret is in the Serve configuration: api_keys"
    folder = config.ingress.settings.api_keys_folder
    if folder is not None and str(folder) != _API_KEYS:
        yield f"api_keys_folder {folder}: the Secret is mounted at {_API_KEYS}"
    if "@" in config.storage:
        yield "a secret is in the Serve configuration: storage"
    yield from _storage_problems(manifests, config)
    yield from _model_problems(manifests, config)
    placed = placed_deployments(text)
    for each in placed:
        yield from _place_problems(manifests, each)
    for pool in {each.pool for each in placed}:
        if pool and manifests.workers_of(pool):
            yield from _pool_problems(pool, manifests.workers_of(pool), [each for each in placed if each.pool == pool])


@cache
def reading_problems(text: str) -> list[str]:
    """What our reader says of it, which looks for unknown keys at every depth, also in Serve's own part."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            load_config(file.name)
        except ConfigError as error:
            return str(error).replace(f"{file.name}: ", "").splitlines()
    return []


@cache
def placed_deployments(text: str) -> list[Placed]:
    """The deployments with all options, the app's defaults among them.

    The app is built for the model in the package, since others are not at hand. Their options are the same.
    """
    args: dict[str, Any] = yaml.safe_load(text)["applications"][0]["args"]
    models = AppConfig.model_validate(args).models
    stand_ins = [
        {**model, "source": "shapes", "variant": None, "name": f"{index}"} for index, model in enumerate(args["models"])
    ]
    app = build(AppConfig.model_validate({**args, "models": stand_ins}))
    deployments = {each.name: each for each in _deployments_in(app)}

    def model_of(name: str) -> ModelOptions | None:
        role, _, index = name.partition("-")
        return models[int(index or 0)] if role in ("TextEncoder", "Denoiser", "Decoder") else None

    return [_placed(deployment, model_of(name)) for name, deployment in deployments.items()]


def _deployments_in(value: Any) -> Iterator[Deployment]:
    if isinstance(value, Application):
        bound = value._bound_deployment
        yield bound
        yield from _deployments_in([*bound.init_args, *bound.init_kwargs.values()])
    elif isinstance(value, Mapping):
        yield from _deployments_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _deployments_in(each)


def _placed(deployment: Deployment, model: ModelOptions | None) -> Placed:
    options: dict[str, Any] = deployment.ray_actor_options or {}
    config = deployment._deployment_config
    scaling = config.autoscaling_config
    return Placed(
        name=deployment.name,
        model=model,
        pool=(options.get("label_selector") or {}).get("pool"),
        num_cpus=options.get("num_cpus", 1.0),
        num_gpus=options.get("num_gpus", 0.0),
        max_replicas=scaling.max_replicas if scaling else config.num_replicas,
        max_per_node=deployment._replica_config.max_replicas_per_node or 100,
        graceful_shutdown_s=config.graceful_shutdown_timeout_s,
        downscale_delay_s=scaling.downscale_delay_s if scaling else None,
    )


def _proxy_problems(manifests: Manifests) -> Iterator[str]:
    content = manifests.serve_config
    if content.get("proxy_location") != "EveryNode":
        yield "proxy_location must be EveryNode: a worker without a proxy is never ready"
    http = content.get("http_options", {})
    if http.get("host") != "0.0.0.0" or http.get("port") != manifests.head.ports.get("serve"):
        yield "http_options: the proxies must listen on 0.0.0.0 and the port named serve"
    if content["applications"][0].get("runtime_env"):
        yield "runtime_env: the package is in the image"
    scalings = [
        pool.get("autoscaling_config", {})
        for model in content["applications"][0]["args"]["models"]
        for pool in model.values()
        if isinstance(pool, dict)
    ]
    if any("initial_replicas" in scaling for scaling in scalings):
        yield "initial_replicas keeps an incremental upgrade from scaling to zero afterwards"


def _storage_problems(manifests: Manifests, config: AppConfig) -> Iterator[str]:
    if "://" in config.storage:
        return
    for group in manifests.workers_of("api"):
        mounts = {mount["mountPath"] for mount in group.container["volumeMounts"]}
        if not any(config.storage == mount or config.storage.startswith(f"{mount}/") for mount in mounts):
            yield f"storage {config.storage}: group {group.name} has no volume there"


def _model_problems(manifests: Manifests, config: AppConfig) -> Iterator[str]:
    """The Job that fills the volume of models downloads those that are served."""
    for job in manifests.all("Job"):
        script = " ".join(job["spec"]["template"]["spec"]["containers"][0]["command"])
        for model in config.models:
            if f"hf download {model.source}" not in script:
                yield f"Job {job['metadata']['name']}: does not download {model.source}"


def _place_problems(manifests: Manifests, each: Placed) -> Iterator[str]:
    if each.pool is None:
        yield f"{each.name}: without a label_selector it may be placed in any pod"
        return
    groups = manifests.workers_of(each.pool)
    if not groups:
        yield f"{each.name}: no group has the label pool: {each.pool}"
    for group in groups:
        if not Pod(group).takes(each):
            yield f"{each.name}: a replica does not fit a pod of group {group.name}"


def _pool_problems(pool: str, groups: list[Group], placed: list[Placed]) -> Iterator[str]:
    pods = [Pod(group) for group in groups for _ in range(group.spec["maxReplicas"])]
    for each in sorted(placed, key=lambda each: (-each.num_gpus, -each.num_cpus)):
        for index in range(each.max_replicas):
            # Where most room is left, as Serve spreads them.
            if not any(pod.takes(each) for pod in sorted(pods, key=lambda pod: len(pod.replicas))):
                yield f"pool {pool}: replica {index + 1} of {each.name} has no pod: maxReplicas is too small"
                break
    yield from {problem for pod in pods for problem in _memory_problems(pod)}
    unused = {pod.group.name for pod in pods if not pod.replicas}
    if pool != "api":  # where spare pods let nodes be emptied
        yield from (f"group {name}: maxReplicas is more than its replicas can use" for name in sorted(unused))


def _memory_problems(pod: Pod) -> Iterator[str]:
    """What the replicas of a full pod take, beside what the pod and its card have."""
    group, names = pod.group, ", ".join(each.name for each in pod.replicas)
    taken = float(group.start_params.get("object-store-memory", 0))
    taken += sum(host_bytes(each.model, each.role, has_gpu=each.num_gpus > 0) for each in pod.replicas)
    if taken > group.limit("memory"):
        yield f"group {group.name}: {names} take {taken / GB:.0f} GB of memory, more than the pod's limit"
    on_gpu = [each for each in pod.replicas if each.num_gpus and each.model]
    taken = sum(gpu_bytes(each.model, each.role) for each in on_gpu if each.model)
    if on_gpu and taken > _card_bytes(group):
        yield f"group {group.name}: {names} take {taken / GB:.0f} GB of a card that has {_card_bytes(group) / GB:.0f}"


def _card_bytes(group: Group) -> float:
    """The memory of the smallest card that the group's node affinity allows."""
    affinity = group.pod.get("affinity", {}).get("nodeAffinity", {})
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", []):
        for expression in term["matchExpressions"]:
            if expression["key"] == "nvidia.com/gpu.memory" and expression["operator"] == "Gt":
                return float(expression["values"][0]) * 2**20
    return 0.0
