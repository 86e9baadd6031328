from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import AppConfig, ConfigError, app_config, load_config

DEFAULT = Path(__file__).parents[2] / "serve_config.yaml"


def refusal_of(content: Any, tmp_path: Path) -> str:
    file = tmp_path / "serve_config.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return str(caught.value)


def default() -> Any:
    return yaml.safe_load(DEFAULT.read_text())


def test_the_default_configuration_is_valid_and_fits_a_small_machine() -> None:
    config = app_config(load_config(DEFAULT))
    pools = (config.text_encoder, config.denoiser, config.decoder, config.orchestrator)
    assert sum(pool.ray_actor_options.num_cpus or 0 for pool in pools) < 1
    assert not any(pool.ray_actor_options.num_gpus for pool in pools)


@pytest.mark.parametrize(
    "path",
    [
        "proxy_locatoin",
        "http_options.prot",
        "logging_config.level",
        "applications.0.routeprefix",
        "applications.0.args.modle",
        "applications.0.args.model.soruce",
        "applications.0.args.limits.max_promt",
        "applications.0.args.denoiser.num_replica",
        "applications.0.args.denoiser.ray_actor_options.num_gpu",
        "applications.0.args.denoiser.settings.token_bugdet",
        "applications.0.args.decoder.settings.memory",
        "applications.0.args.text_encoder.settings.batch",
        "applications.0.args.claims.settings.lease",
        "applications.0.args.orchestrator.settings.heartbeat",
        "applications.0.args.orchestrator.graceful_shutdown_timeout",
    ],
)
def test_an_unknown_key_anywhere_is_named(path: str, tmp_path: Path) -> None:
    content = place = default()
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent)] if parent.isdecimal() else place.setdefault(parent, {})
    place[key] = 1
    assert path.removeprefix("applications.0.args.") in refusal_of(content, tmp_path)


def test_an_unknown_key_of_autoscaling_is_named(tmp_path: Path) -> None:
    content = default()
    denoiser = content["applications"][0]["args"]["denoiser"]
    del denoiser["num_replicas"]
    denoiser["autoscaling_config"] = {"min_replica": 0}
    assert "autoscaling_config.min_replica: unknown key; did you mean min_replicas?" in refusal_of(content, tmp_path)


def test_a_near_miss_is_told(tmp_path: Path) -> None:
    assert "http_options.prt: unknown key; did you mean port?" in refusal_of(
        {**default(), "http_options": {"prt": 1}}, tmp_path
    )


@pytest.mark.parametrize("content", ["", "[]", "a: [", "3"])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    assert "serve_config.yaml" in refusal_of(content, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_wrong_values_are_named(tmp_path: Path) -> None:
    content = default()
    content["applications"][0]["args"]["denoiser"]["settings"]["token_budget"] = -1
    assert "denoiser.settings.token_budget" in refusal_of(content, tmp_path)


def test_replicas_are_fixed_or_scaled() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        AppConfig.model_validate({"denoiser": {"num_replicas": 1, "autoscaling_config": {"min_replicas": 0}}})


def test_claims_is_one() -> None:
    with pytest.raises(ValidationError, match=r"claims\.num_replicas"):
        AppConfig.model_validate({"claims": {"num_replicas": 2}})


def test_the_model_is_set_in_one_place() -> None:
    with pytest.raises(ValidationError, match=r"denoiser\.settings\.source: set model\.source"):
        AppConfig.model_validate({"denoiser": {"settings": {"source": "elsewhere"}}})


def test_a_model_is_called_by_the_last_part_of_its_source() -> None:
    names = {
        source: AppConfig.model_validate({"model": {"source": source}}).model.public_name
        for source in ("shapes", "/models/mini/", "owner/name@main", "s3://bucket/models/one")
    }
    assert list(names.values()) == ["shapes", "mini", "name", "one"]
