from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.config import AppConfig, ConfigError, app_config, load_config

DEFAULT = Path(__file__).parents[2] / "serve_config.yaml"


def refusal_of(content: Any, tmp_path: Path) -> str:
    file = tmp_path / "serve_config.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return str(caught.value)


def config_of(*models: dict[str, Any]) -> AppConfig:
    return AppConfig.model_validate({"models": list(models)})


def default() -> Any:
    return yaml.safe_load(DEFAULT.read_text())


def test_the_default_configuration_is_valid_and_fits_a_small_machine() -> None:
    config = app_config(load_config(DEFAULT))
    (model,) = config.models
    assert not isinstance(model.decoder, str)
    pools = (model.text_encoder, model.denoiser, model.decoder, config.orchestrator)
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
        "applications.0.args.models.0.soruce",
        "applications.0.args.limits.max_promt",
        "applications.0.args.models.0.denoiser.num_replica",
        "applications.0.args.models.0.denoiser.ray_actor_options.num_gpu",
        "applications.0.args.models.0.denoiser.settings.token_bugdet",
        "applications.0.args.models.0.decoder.settings.memory",
        "applications.0.args.models.0.text_encoder.settings.batch",
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
    denoiser = content["applications"][0]["args"]["models"][0]["denoiser"]
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
    content["applications"][0]["args"]["models"][0]["denoiser"]["settings"]["token_budget"] = -1
    assert "denoiser.settings.token_budget" in refusal_of(content, tmp_path)


def test_replicas_are_fixed_or_scaled() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        config_of({"denoiser": {"num_replicas": 1, "autoscaling_config": {"min_replicas": 0}}})


def test_claims_is_one() -> None:
    with pytest.raises(ValidationError, match=r"claims\.num_replicas"):
        AppConfig.model_validate({"claims": {"num_replicas": 2}})


@pytest.mark.parametrize("name", ["source", "family", "dtype"])
def test_what_all_pools_share_is_set_in_one_place(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"denoiser\.settings\.{name}: set the model's {name}, for all"):
        config_of({"denoiser": {"settings": {name: "elsewhere"}}})


def test_a_model_is_called_by_the_last_part_of_its_source() -> None:
    names = {
        source: config_of({"source": source}).models[0].public_name
        for source in ("shapes", "/models/mini/", "owner/name@main", "s3://bucket/models/one")
    }
    assert list(names.values()) == ["shapes", "mini", "name", "one"]


def test_settings_that_only_the_family_knows_lie_beside_the_others() -> None:
    (model,) = config_of({"denoiser": {"settings": {"attention": "dense", "token_budget": 9}}}).models
    assert (model.denoiser_config.token_budget, model.denoiser_config.options) == (9, {"attention": "dense"})
    with pytest.raises(ValidationError, match=r"denoiser\.settings\.attention: Input should be 'dense', 'blocks' or"):
        config_of({"denoiser": {"settings": {"attention": "none"}}})
    with pytest.raises(ValidationError, match=r"denoiser\.settings\.tiling: unknown key"):
        config_of({"denoiser": {"settings": {"tiling": 64}}})
    with pytest.raises(ValidationError, match=r"denoiser\.settings\.attention: unknown key"):
        config_of({"family": "tests.families.noise:FAMILY", "denoiser": {"settings": {"attention": "dense"}}})


def test_decoding_may_run_in_the_denoisers_replicas_with_their_threads() -> None:
    (model,) = config_of({"decoder": "with denoiser", "denoiser": {"settings": {"num_threads": 3}}}).models
    assert model.decoder_config.num_threads == 3
    settings = {"memory_budget_bytes": 7, "tiling": 64}
    (model,) = config_of({"decoder": {"with": "denoiser", "settings": settings}}).models
    assert (model.decoder_config.memory_budget_bytes, model.decoder_config.options) == (7, {"tiling": 64})
    with pytest.raises(ValidationError, match=r"decoder\.settings\.num_threads: is the denoiser's"):
        config_of({"decoder": {"with": "denoiser", "settings": {"num_threads": 2}}})
    with pytest.raises(ValidationError, match=r"decoder\.settings\.tilling: unknown key"):
        config_of({"decoder": {"with": "denoiser", "settings": {"tilling": 64}}})
    with pytest.raises(ValidationError, match=r"decoder\.beside: unknown key|beside"):
        config_of({"decoder": "beside denoiser"})
    with pytest.raises(ValidationError, match="num_replica"):
        config_of({"decoder": {"num_replica": 3}})


def test_models_need_names_of_their_own() -> None:
    with pytest.raises(ValidationError, match=r"models\.1\.name: 'shapes' is 'shapes', another model's"):
        config_of({}, {})
    with pytest.raises(ValidationError, match=r"models\.1\.name: 'a b' is as a deployment's name the same as 'a-b'"):
        config_of({"name": "a-b"}, {"name": "a b"})
    assert [model.public_name for model in config_of({}, {"name": "other"}).models] == ["shapes", "other"]


def test_a_deployment_has_a_name_in_ascii_whatever_the_model_is_called() -> None:
    assert config_of({"name": "über/größe"}).models[0].deployment_suffix == "-ber-gr--e"


# --- the layout of earlier releases, which had one model ---


def test_one_model_may_stand_at_the_top_with_its_pools_beside_it() -> None:
    old = {"model": {"source": "mini", "dtype": "float32"}, "denoiser": {"num_replicas": 2}, "storage": "here"}
    new = {"models": [{"source": "mini", "dtype": "float32", "denoiser": {"num_replicas": 2}}], "storage": "here"}
    assert AppConfig.model_validate(old) == AppConfig.model_validate(new)
    with pytest.raises(ValidationError, match="model: is part of each of the models"):
        AppConfig.model_validate({**old, **new})


@pytest.mark.parametrize(
    "path", ["model.soruce", "denoiser.num_replica", "decoder.settings.memory", "text_encoder.settings.batch"]
)
def test_problems_are_named_where_they_stand_in_the_old_layout_too(path: str, tmp_path: Path) -> None:
    content = default()
    del content["applications"][0]["args"]["models"]
    place = content["applications"][0]["args"]
    *parents, key = path.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[key] = 1
    said = refusal_of(content, tmp_path)
    assert path in said and "models" not in said


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("num_replica", 3, "models.0.decoder.num_replica: unknown key"),
        (
            "max_ongoing_requests",
            0,
            "models.0.decoder.max_ongoing_requests: Input should be greater than or equal to 1",
        ),
    ],
)
def test_problems_with_a_decoder_are_named_as_those_of_other_pools(
    key: str, value: int, line: str, tmp_path: Path
) -> None:
    content = default()
    content["applications"][0]["args"]["models"][0]["decoder"][key] = value
    assert f"args.{line}" in refusal_of(content, tmp_path)


def test_an_app_has_a_model() -> None:
    with pytest.raises(ValidationError, match="models: give at least one"):
        config_of()
