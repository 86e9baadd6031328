"""The overlay of Kubernetes that a plan rests on, and the one that it writes on top: replicas, and their pods."""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.planning.published import Published
from deployments.planning.simulation import Layout

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


@dataclass(frozen=True)
class Overlay:
    """An overlay's folder, and its ``serve_config.yaml``."""

    folder: Path | None
    config: Mapping[str, Any]

    @classmethod
    def of_defaults(cls) -> "Overlay":
        """The app's own settings, where no overlay is at hand."""
        return cls(None, {"applications": [{"args": {"models": [{}]}}]})

    @classmethod
    def read(cls, folder: Path) -> "Overlay":
        """Raises ``ValueError`` for a folder without a configuration of one model with three pools."""
        file = folder / "serve_config.yaml"
        try:
            config = yaml.safe_load(file.read_text())
            (model,) = config["applications"][0]["args"]["models"]
            _ = [dict(model[pool]) for pool in ("text_encoder", "denoiser", "decoder")]
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError):
            raise ValueError(f"{file}: must serve one model with a text_encoder, a denoiser and a decoder") from None
        return cls(folder, config)

    @property
    def decoder_settings(self) -> dict[str, Any]:
        """``memory_budget_bytes`` and ``max_batch_size``."""
        settings = self._settings("decoder")
        return {
            "memory_budget_bytes": settings.get("memory_budget_bytes", _MEMORY_BUDGET),
            "max_batch_size": settings.get("max_batch_size", _MAX_BATCH_SIZE),
        }

    def layout(self, published: Published | None) -> Layout:
        """One replica of each pool with these settings. Where a model's memory is not known, all of it is kept."""
        denoiser, decoder = self._settings("denoiser"), self._settings("decoder")
        claims = self.config["applications"][0]["args"].get("claims", {}).get("settings", {})
        memory, host_budget = _NO_MEMORY, decoder.get("host_budget_bytes", _HOST_BUDGET)
        if published is not None:
            memory = published.decoder_memory
        return Layout(
            max_running=claims.get("max_running", _MAX_RUNNING),
            token_budget=denoiser.get("token_budget", _TOKEN_BUDGET),
            max_slots=denoiser.get("max_slots"),
            max_batch_size=self.decoder_settings["max_batch_size"],
            memories_on_device=int(self.decoder_settings["memory_budget_bytes"] // memory),
            memories_in_host=int(host_budget // memory),
        )

    def write(self, folder: Path, layout: Layout, *, model: str, variant: str | None) -> None:
        """Write a kustomization over this overlay: the Serve configuration, and a patch of the groups of workers.

        Files of the same names are replaced. Raises ``ValueError`` where the folder cannot be written.
        """
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
            config = yaml.safe_dump(self._planned(layout, model, variant), sort_keys=False, width=120)
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

    def _planned(self, layout: Layout, source: str, variant: str | None) -> dict[str, Any]:
        config = deepcopy(dict(self.config))
        args = config["applications"][0]["args"]
        (model,) = args["models"]
        if (model.get("source"), model.get("variant")) != (source, variant):
            model |= {"source": source, "variant": variant}
            model.pop("name", None)
        for pool, count in (
            ("text_encoder", layout.num_text_encoders),
            ("denoiser", layout.num_denoisers),
            ("decoder", layout.num_decoders),
        ):
            scaling = model[pool].setdefault("autoscaling_config", {})
            scaling |= {"min_replicas": count, "max_replicas": count}
        args["orchestrator"] = {**args.get("orchestrator", {}), "num_replicas": max(layout.num_save_cores, 2)}
        claims = args.setdefault("claims", {})
        claims["settings"] = {**claims.get("settings", {}), "max_running": layout.max_running}
        return config

    def _settings(self, pool: str) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = (
            self.config["applications"][0]["args"]["models"][0].get(pool, {}).get("settings", {})
        )
        return settings


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
