"""The overlay of Kubernetes that a plan rests on, and the one that it writes on top: replicas, and their pods."""

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from deployments.planning.published import Published
from deployments.planning.simulation import Layout
from pyramid_serve.reasons import first_line

GIB = 2**30
_TOKEN_BUDGET = 32_768
_MAX_BATCH_SIZE = 8
_MEMORY_BUDGET = 20 * GIB
_HOST_BUDGET = 40 * GIB
_MAX_RUNNING = 32
_NO_MEMORY = 1.0
"""Bytes of a video that a decoder remembers, where they are not known: all are remembered."""
_GROUPS = ("api", "text", "denoise", "decode")
"""In the order of ``k8s/base/rayservice.yaml``, by which patches name them."""
_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_OF_ANY_MODEL = ("device", "num_threads", "max_turn_s")
SETTINGS_OF_POOLS = {
    "text_encoder": (*_OF_ANY_MODEL, "max_batch_size", "batch_wait_timeout_s", "cache_bytes"),
    "denoiser": (*_OF_ANY_MODEL, "token_budget", "max_slots", "warm_up_size", "state_interval_s"),
    "decoder": (*_OF_ANY_MODEL, "max_batch_size", "memory_budget_bytes", "host_budget_bytes", "warm_up_size"),
}
"""The settings that each pool has with every model; all others are options of one model's family."""

_READ = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class _PoolSettings(BaseModel):
    """The settings of any pool that a plan depends on. What is left out is the app's default."""

    model_config = _READ

    token_budget: PositiveInt = _TOKEN_BUDGET
    max_slots: PositiveInt | None = None
    max_batch_size: PositiveInt | None = _MAX_BATCH_SIZE
    memory_budget_bytes: NonNegativeInt = _MEMORY_BUDGET
    host_budget_bytes: NonNegativeInt = _HOST_BUDGET


class _ClaimsSettings(BaseModel):
    model_config = _READ

    max_running: PositiveInt = _MAX_RUNNING


class _ActorOptions(BaseModel):
    model_config = _READ

    label_selector: dict[str, str] | None = None


class _Deployment(BaseModel):
    model_config = _READ

    ray_actor_options: _ActorOptions = _ActorOptions()
    autoscaling_config: dict[str, Any] | None = None

    @property
    def group(self) -> str | None:
        """The group of workers that the replicas are to be on."""
        return (self.ray_actor_options.label_selector or {}).get("pool")


class _Pool(_Deployment):
    settings: _PoolSettings = _PoolSettings()


class _Claims(_Deployment):
    settings: _ClaimsSettings = _ClaimsSettings()


class _Model(BaseModel):
    model_config = _READ

    source: str = "shapes"
    variant: str | None = None
    family: str | None = None
    name: str | None = None
    text_encoder: _Pool
    denoiser: _Pool
    decoder: _Pool


class _Arguments(BaseModel):
    model_config = _READ

    models: Annotated[tuple[_Model, ...], Field(min_length=1, max_length=1)]
    orchestrator: _Deployment = _Deployment()
    claims: _Claims = _Claims()

    @property
    def model(self) -> _Model:
        return self.models[0]


class _Application(BaseModel):
    model_config = _READ

    args: _Arguments


class _Config(BaseModel):
    model_config = _READ

    applications: Annotated[tuple[_Application, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Overlay:
    """An overlay's folder, and its ``serve_config.yaml``."""

    folder: Path | None
    config: Mapping[str, Any]

    @classmethod
    def of_defaults(cls) -> "Overlay":
        """The app's own settings, where no overlay is at hand."""
        pools: dict[str, Any] = {pool: {} for pool in SETTINGS_OF_POOLS}
        return cls(None, {"applications": [{"args": {"models": [pools]}}]})

    @classmethod
    def read(cls, folder: Path) -> "Overlay":
        """Raises ``ValueError`` for a folder without a configuration of one model with three pools."""
        file = folder / "serve_config.yaml"
        shape = "must serve one model with a text_encoder, a denoiser and a decoder"
        try:
            config = yaml.safe_load(file.read_text())
            _Config.model_validate(config)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{file}: {shape}; {where or 'the file'}: {problem['msg']}") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ValueError(f"{file}: {shape}; it is not valid YAML (UTF-8)") from None
        return cls(folder, config)

    @property
    def decoder_settings(self) -> dict[str, Any]:
        """``memory_budget_bytes`` and ``max_batch_size``."""
        return self._arguments.model.decoder.settings.model_dump(include={"memory_budget_bytes", "max_batch_size"})

    def name_of(self, source: str) -> str | None:
        """The public name that this overlay gives a model. None: it serves another one, or gives it no name."""
        model = self._arguments.model
        return model.name if model.source == source else None

    def layout(self, published: Published | None) -> Layout:
        """One replica of each pool with these settings. Where a model's memory is not known, all of it is kept."""
        arguments = self._arguments
        denoiser, decoder = arguments.model.denoiser.settings, arguments.model.decoder.settings
        memory = _NO_MEMORY if published is None else published.decoder_memory
        return Layout(
            max_running=arguments.claims.settings.max_running,
            token_budget=denoiser.token_budget,
            max_slots=denoiser.max_slots,
            max_batch_size=decoder.max_batch_size,
            memories_on_device=int(decoder.memory_budget_bytes // memory),
            memories_in_host=int(decoder.host_budget_bytes // memory),
        )

    def check_can_be_written_over(self, folder: Path) -> None:
        """Raise ``ValueError`` where an overlay in ``folder`` over this one would not build or would destroy it."""
        assert self.folder is not None
        if not any((self.folder / name).is_file() for name in _KUSTOMIZATIONS):
            raise ValueError(f"--base {self.folder}: has no {_KUSTOMIZATIONS[0]}, which --write needs")
        written = folder.resolve()
        for root in _roots(self.folder.resolve(), frozenset()):
            if written == root or root in written.parents:
                raise ValueError(
                    f"--write {folder}: is in {root}, which --base {self.folder} is built from; "
                    "give a folder outside it"
                )
        arguments, model = self._arguments, self._arguments.model
        deployments = (arguments.orchestrator, model.text_encoder, model.denoiser, model.decoder)
        lacking = [group for group, one in zip(_GROUPS, deployments, strict=True) if one.group != group]
        if lacking:
            raise ValueError(
                f"--base {self.folder}: no replicas are placed in the groups of workers {', '.join(lacking)}, whose "
                "sizes --write sets; give an overlay such as k8s/overlays/pools"
            )

    def write(
        self,
        folder: Path,
        layout: Layout,
        *,
        model: str,
        variant: str | None,
        family: str | None,
        default_size: tuple[int, int],
    ) -> None:
        """Write a kustomization over this overlay: the Serve configuration, and a patch of the groups of workers.

        family: the import path of a family that is not in this package. default_size: (width, height) in pixels that
        replicas are warmed up with where the overlay serves another model. Files of the same names are replaced.
        Raises ``ValueError`` where the folder cannot be written or an overlay in it would not build.
        """
        self.check_can_be_written_over(folder)
        assert self.folder is not None
        counts = {
            "api": max(layout.num_save_cores, 2),
            "text": layout.num_text_encoders,
            "denoise": layout.num_denoisers,
            "decode": layout.num_decoders,
        }
        patch = [
            {"op": "replace", "path": f"/spec/rayClusterConfig/workerGroupSpecs/{index}/{key}", "value": counts[group]}
            for index, group in enumerate(_GROUPS)
            for key in ("replicas", "minReplicas", "maxReplicas")
        ]
        tests = [
            {"op": "test", "path": f"/spec/rayClusterConfig/workerGroupSpecs/{index}/groupName", "value": group}
            for index, group in enumerate(_GROUPS)
        ]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kustomization = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [os.path.relpath(self.folder.resolve(), folder.resolve())],
                "patches": [
                    {"path": "groups.yaml", "target": {"kind": "RayService"}},
                    {"path": "serve.yaml", "target": {"kind": "RayService"}},
                ],
            }
            config = yaml.safe_dump(
                self._planned(layout, _PlannedModel(model, variant, family, default_size)), sort_keys=False, width=120
            )
            serve = {
                "apiVersion": "ray.io/v1",
                "kind": "RayService",
                "metadata": {"name": "pyramid-serve"},
                "spec": {"serveConfigV2": config},
            }
            for name, content in (
                ("kustomization.yaml", kustomization),
                ("groups.yaml", tests + patch),
                ("serve.yaml", serve),
            ):
                (folder / name).write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120))
            (folder / "serve_config.yaml").write_text(config)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from None

    def _planned(self, layout: Layout, planned: "_PlannedModel") -> dict[str, Any]:
        config = deepcopy(dict(self.config))
        args = config["applications"][0]["args"]
        model = planned.serve_instead_of(args["models"][0])
        for pool, count in (
            ("text_encoder", layout.num_text_encoders),
            ("denoiser", layout.num_denoisers),
            ("decoder", layout.num_decoders),
        ):
            options = {key: value for key, value in model[pool].items() if key != "num_replicas"}
            scaling = {**(options.get("autoscaling_config") or {}), "min_replicas": count, "max_replicas": count}
            model[pool] = {**options, "autoscaling_config": scaling}
        args["models"] = [model]
        orchestrator = {key: value for key, value in args["orchestrator"].items() if key != "autoscaling_config"}
        args["orchestrator"] = {**orchestrator, "num_replicas": max(layout.num_save_cores, 2)}
        claims = args.get("claims", {})
        args["claims"] = {**claims, "settings": {**claims.get("settings", {}), "max_running": layout.max_running}}
        return config

    @property
    def _arguments(self) -> _Arguments:
        return _Config.model_validate(self.config).applications[0].args


@dataclass(frozen=True)
class _PlannedModel:
    """The model that an overlay is written for."""

    source: str
    variant: str | None
    family: str | None
    default_size: tuple[int, int]

    def serve_instead_of(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """A model's part of the configuration, without what holds of another model alone."""
        is_same = (model.get("source", "shapes"), model.get("variant")) == (self.source, self.variant)
        if is_same and self.family in (None, model.get("family")):
            return dict(model)
        served: dict[str, Any] = {"source": self.source, "variant": self.variant}
        if self.family is not None:
            served["family"] = self.family
        for pool, names in SETTINGS_OF_POOLS.items():
            settings = {name: value for name, value in model[pool].get("settings", {}).items() if name in names}
            if "warm_up_size" in settings:
                settings["warm_up_size"] = list(self.default_size)
            options = {key: value for key, value in model[pool].items() if key != "settings"}
            served[pool] = {**options, "settings": settings} if settings else options
        return served


def _roots(folder: Path, seen: frozenset[Path]) -> Iterator[Path]:
    """A folder, and every local folder that its kustomization and theirs are built from. All are resolved."""
    yield folder
    for file in (folder / name for name in _KUSTOMIZATIONS):
        if not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: cannot be read: {first_line(error)}") from None
        if not isinstance(content, dict) or not all(
            isinstance(content.get(key) or [], list) for key in ("resources", "components")
        ):
            raise ValueError(f"{file}: must be a mapping, with resources and components as lists")
        for key in ("resources", "components"):
            for name in content.get(key) or ():
                root = (folder / str(name)).resolve()
                if root.is_dir() and root not in seen:
                    yield from _roots(root, seen | {folder})


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
