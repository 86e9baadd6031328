from pathlib import Path

import pytest

from deployments.claims.config import ClaimsConfig
from deployments.planning.overlay import Overlay
from deployments.planning.published import MODELS
from deployments.planning.simulation import Layout
from deployments.pools.decoder import DecoderConfig
from deployments.pools.denoiser import DenoiserConfig

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
