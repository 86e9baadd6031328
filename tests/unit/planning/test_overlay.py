import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.claims.config import ClaimsConfig
from deployments.planning.overlay import SETTINGS_OF_POOLS, Overlay
from deployments.planning.published import MODELS
from deployments.planning.simulation import Layout
from deployments.pools.decoder import DecoderConfig
from deployments.pools.denoiser import DenoiserConfig
from deployments.pools.model_config import ModelConfig
from deployments.pools.text_encoder import TextEncoderConfig
from tests.k8s.manifests_at_hand import K8S

CONFIG = """
applications:
  - args:
      models:
        - source: any
          text_encoder: {}
          denoiser: { settings: { token_budget: 1000, max_slots: 3 } }
          decoder: { settings: { memory_budget_bytes: 18000000000, host_budget_bytes: 27000000000 } }
      claims: { settings: { max_running: 50 } }
"""


def test_what_is_not_set_is_what_the_app_does() -> None:
    denoiser, decoder = DenoiserConfig(source="any"), DecoderConfig(source="any")
    overlay = Overlay.of_defaults()
    assert overlay.layout(None) == Layout(
        max_running=ClaimsConfig().max_running,
        token_budget=denoiser.token_budget,
        max_slots=denoiser.max_slots,
        max_batch_size=decoder.max_batch_size,
        memories_on_device=decoder.memory_budget_bytes,
        memories_in_host=decoder.host_budget_bytes,
    )
    assert overlay.decoder_settings["memory_budget_bytes"] == decoder.memory_budget_bytes


def test_the_settings_of_an_overlay_hold(tmp_path: Path) -> None:
    (tmp_path / "serve_config.yaml").write_text(CONFIG)
    layout = Overlay.read(tmp_path).layout(MODELS["rain1011/pyramid-flow-sd3", "768p"])
    assert (layout.token_budget, layout.max_slots, layout.max_running) == (1000, 3, 50)
    assert (layout.memories_on_device, layout.memories_in_host) == (2, 3)


def test_an_overlay_that_shares_pools_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        Overlay.read(tmp_path)
    for text in ("", "applications: []", CONFIG.replace("decoder: {", "encoder: {")):
        (tmp_path / "serve_config.yaml").write_text(text)
        with pytest.raises(ValueError, match="must serve one model with a text_encoder, a denoiser and a decoder"):
            Overlay.read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("{ token_budget: 1000, max_slots: 3 }", "null", "models.0.denoiser.settings"),
        ("{ settings: { max_running: 50 } }", "null", "claims"),
        ("18000000000", "x", "models.0.decoder.settings.memory_budget_bytes"),
        ("token_budget: 1000", "token_budget: -1", "models.0.denoiser.settings.token_budget"),
        ("text_encoder: {}", "text_encoder: { ray_actor_options: 3 }", "models.0.text_encoder.ray_actor_options"),
    ],
)
def test_a_value_that_does_not_fit_is_named_in_one_line(old: str, new: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "serve_config.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises(ValueError, match=rf"applications\.0\.args\.{where}: ") as caught:
        Overlay.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_that_every_model_has_are_those_of_the_pools() -> None:
    for pool, config in (("text_encoder", TextEncoderConfig), ("denoiser", DenoiserConfig), ("decoder", DecoderConfig)):
        of_model = {"source", "variant", "family", "dtype", "options"}
        assert of_model < ModelConfig.model_fields.keys()
        assert set(SETTINGS_OF_POOLS[pool]) == config.model_fields.keys() - of_model


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of ``k8s``, in which tests may write."""
    return Path(shutil.copytree(K8S, tmp_path / "k8s"))


def write(base: Path, folder: Path, model: str = "rain1011/pyramid-flow-sd3", **fields: Any) -> dict[str, Any]:
    """The model of the configuration that is written."""
    fields = {"variant": "768p", "family": None, "default_size": (640, 384), **fields}
    Overlay.read(base).write(folder, Layout(), model=model, **fields)
    written = yaml.safe_load((folder / "serve_config.yaml").read_text())
    (found,) = written["applications"][0]["args"]["models"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("inside", ["overlays/pools", "overlays/pools/planned", "base", "base/planned"])
def test_an_overlay_is_not_written_into_what_it_is_built_from(inside: str, tree: Path) -> None:
    base = tree / "overlays" / "pools"
    before = (base / "kustomization.yaml").read_text()
    with pytest.raises(ValueError, match=r"--write .*: is in .*, which --base .*pools is built from"):
        write(base, tree / inside)
    assert (base / "kustomization.yaml").read_text() == before
    assert not (base / "planned").exists()


def test_an_overlay_over_a_planned_one_is_not_written_below_either(tree: Path) -> None:
    write(tree / "overlays" / "pools", tree / "planned")
    write(tree / "planned", tree / "again")
    with pytest.raises(ValueError, match=r"--write .*: is in "):
        write(tree / "again", tree / "planned")


@pytest.mark.parametrize(
    ("overlay", "lacking"), [("dev", "text, denoise, decode"), ("single-gpu", "text, denoise, decode")]
)
def test_a_base_without_a_group_for_each_pool_is_refused(overlay: str, lacking: str, tree: Path) -> None:
    with pytest.raises(ValueError, match=f"groups of workers {lacking}, whose sizes"):
        write(tree / "overlays" / overlay, tree / "planned")
    assert not (tree / "planned").exists()


def test_a_base_that_is_no_kustomization_is_refused(tree: Path) -> None:
    (tree / "overlays" / "pools" / "kustomization.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no kustomization\.yaml"):
        write(tree / "overlays" / "pools", tree / "planned")


def test_an_overlay_for_another_model_keeps_nothing_of_the_old_one(tree: Path) -> None:
    file = tree / "overlays" / "pools" / "serve_config.yaml"
    content = yaml.safe_load(file.read_text())
    model = content["applications"][0]["args"]["models"][0]
    model |= {"family": "old.family:FAMILY", "dtype": "float32"}
    model["denoiser"]["settings"] |= {"token_budget": 1000, "an_option_of_the_family": True}
    file.write_text(yaml.safe_dump(content))
    other = write(file.parent, tree / "planned")
    assert {"family", "dtype", "name"}.isdisjoint(other)
    assert "settings" not in other["text_encoder"]
    assert other["denoiser"]["settings"] == {"token_budget": 1000, "warm_up_size": [640, 384]}
    assert other["decoder"]["settings"]["warm_up_size"] == [640, 384]
    assert other["decoder"]["settings"]["max_batch_size"] == 2
    assert write(file.parent, tree / "planned", family="new:FAMILY")["family"] == "new:FAMILY"
    same = write(file.parent, tree / "planned", model="rain1011/pyramid-flow-miniflux")
    assert same["denoiser"]["settings"] == model["denoiser"]["settings"]
    assert (same["family"], same["dtype"], same["name"]) == ("old.family:FAMILY", "float32", "miniflux")


def test_replicas_of_the_plan_replace_a_number_that_was_set(tree: Path) -> None:
    file = tree / "overlays" / "pools" / "serve_config.yaml"
    content = yaml.safe_load(file.read_text())
    decoder = content["applications"][0]["args"]["models"][0]["decoder"]
    decoder |= {"num_replicas": 3, "autoscaling_config": None}
    file.write_text(yaml.safe_dump(content))
    written = write(file.parent, tree / "planned")["decoder"]
    assert "num_replicas" not in written
    assert written["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 1}
