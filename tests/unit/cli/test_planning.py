"""``pyramid-serve plan``, as its user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.cli import main
from deployments.planning.published import config_source, published_of
from tests.k8s.manifests_at_hand import ROOT

BENCH = ROOT / "tests" / "unit" / "planning" / "bench.json"
MINIFLUX = "rain1011/pyramid-flow-miniflux"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without models, and no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("deployments.planning.sizing.NUM_CONFIRMING", 50)  # what is tested here is not how near it is


def plan(*arguments: str) -> int:
    return main(["plan", "--model", MINIFLUX, "--variant", "768p", *arguments])


def test_a_plan_says_what_a_load_takes_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--videos-per-minute", "2", "--seconds", "2", "--gpu", "H200", "--price-per-gpu-hour", "3.6", "--json")
    assert plan(*load) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["videos"] == ["1280x768 2.04 s"]
    assert figures["num_gpus"] == sum(pool["replicas"] for pool in figures["pools"].values())
    assert figures["latency_p50"] <= figures["latency_p95"] <= figures["latency_p95_asked_for"]
    assert figures["gpu_seconds_per_video"] == pytest.approx(figures["num_gpus"] * 30)
    assert figures["cost_per_video"] == pytest.approx(figures["gpu_seconds_per_video"] / 1000)
    assert figures["memory_problems"] == []


def test_a_card_that_is_too_small_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--videos-per-minute", "1", "--seconds", "1", "--gpu", "L40S") == 0
    printed = capsys.readouterr().out
    assert "decoder takes 96 GB of a card that has 48" in printed
    assert "text_encoder takes" not in printed


def test_sizes_and_lengths_are_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--videos-per-minute", "1", "--seconds", "1,2", "--gpu", "H200") == 0
    assert "1280x768 1.04 s, 1280x768 2.04 s: 1 videos a minute" in capsys.readouterr().out


def test_a_plan_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ROOT / "k8s" / "overlays" / "pools"
    load = ("--videos-per-minute", "1", "--seconds", "1", "--gpu", "H200", "--base", str(base))
    assert plan(*load, "--write", str(tmp_path / "planned")) == 0
    assert "kubectl apply -k" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "planned").iterdir()} == {
        "kustomization.yaml",
        "groups.yaml",
        "serve.yaml",
        "serve_config.yaml",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--videos-per-minute", "1", "--gpu", "B200"), "--gpu B200: must be one of H200, H100, A100, L40S"),
        (("--gpus", "2", "--gpu", "H200"), "--gpus 2: must be 1"),
        (("--videos-per-minute", "1", "--bench", "x.json"), "x.json: cannot be read"),
        (("--videos-per-minute", "1", "--bench", "x.json", "--share", "0.5"), "--share: goes with --gpu"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--p95", "1"), "--p95 1: not reached"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--size", "64x64"), "size=64x64"),
        (("--gpus", "1", "--gpu", "H200", "--write", "out"), "k8s/overlays/single-gpu"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--base", "none"), "--base none: must be a folder"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--seconds", "5,,3"), "--seconds 5,,3: an item is empty"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--size", "1280x768,"), "--size 1280x768,: an item is empty"),
        (("--videos-per-minute", "1", "--gpu", "H200", "--size", ""), "--size : an item is empty"),
        (("--compare", "--bench", "x.json", "--p95", "9"), "--p95: has no effect with --compare"),
        (("--compare", "--bench", "x.json", "--json"), "--json: has no effect with --compare"),
        (("--compare", "--bench", "x.json", "--write", "out"), "--write: has no effect with --compare"),
        (("--compare", "--bench", "x.json", "--price-per-gpu-hour", "3"), "--price-per-gpu-hour: has no effect"),
        (("--compare", "--bench", "x.json", "--seconds", "3"), "--seconds: has no effect with --compare"),
        (
            ("--videos-per-minute", "1", "--gpu", "H200", "--variant", "512p"),
            "--variant 512p: must be one of 384p, 768p",
        ),
        (
            ("--videos-per-minute", "1", "--bench", str(BENCH)),
            "of the model shapes, but --model is pyramid-flow-miniflux",
        ),
        (("--compare", "--bench", str(BENCH)), "of the model shapes, but --model is pyramid-flow-miniflux"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_whose_arithmetic_is_not_known_needs_a_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--videos-per-minute", "1", "--gpu", "H200"]) == 2
    assert "for others give --bench FILE" in capsys.readouterr().err


def test_a_plan_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from deployments.cli import main; "
        f"main(['plan', '--model', {MINIFLUX!r}, '--variant', '768p', '--gpu', 'H200', '--videos-per-minute', '1', "
        "'--seconds', '1']); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_load_that_is_too_much_for_claims_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--videos-per-minute", "10", "--seconds", "1", "--gpu", "H200") == 0
    assert "Claims takes about" not in capsys.readouterr().out
    assert plan("--videos-per-minute", "3000", "--seconds", "1", "--gpu", "H200") == 0
    assert "Claims takes about 350 updates a second, so this is more than one app can do" in capsys.readouterr().out


def test_a_bench_is_simulated_beside_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--compare", "--bench", str(BENCH)]) == 0
    assert "measured, simulated" in capsys.readouterr().out
    assert plan("--compare", "--gpu", "H200") == 2
    assert "--compare: goes with --bench FILE" in capsys.readouterr().err


def test_a_bench_sizes_no_text_pool_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--bench", str(BENCH), "--videos-per-minute", "20", "--seconds", "2"]) == 0
    assert "The text pool is not sized" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["./models/", "s3://bucket/models/"])
def test_a_copy_of_a_published_model_is_known_by_its_name(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--videos-per-minute", "1", "--seconds", "1", "--gpu", "H200", "--variant", "384p")
    assert main(["plan", "--model", "rain1011/pyramid-flow-sd3", *load]) == 0
    expected = capsys.readouterr().out
    assert main(["plan", "--model", f"{place}pyramid-flow-sd3/", *load]) == 0
    assert capsys.readouterr().out == expected.replace("rain1011/", place).replace("sd3", "sd3/", 1)


def test_the_configurations_in_the_package_are_the_published_ones() -> None:
    configs = ROOT / "deployments" / "planning" / "configs"
    for name in ("sd3", "miniflux"):
        expected = (ROOT / "tests" / "published" / f"{name}_transformer_config.json").read_text()
        found = {file.read_text() for file in configs.glob(f"pyramid-flow-{name}/*/config.json")}
        assert found == {expected}


def test_a_published_model_needs_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", MINIFLUX, "--gpu", "H200", "--videos-per-minute", "1"]) == 2
    expected = f"--variant missing: must be one of 384p, 768p for --model {MINIFLUX}"
    assert expected in capsys.readouterr().err


def test_a_model_of_another_owner_is_not_the_published_one() -> None:
    assert published_of(MINIFLUX, "768p") is not None
    assert published_of("otherowner/pyramid-flow-miniflux", "768p") is None
    assert config_source("otherowner/pyramid-flow-miniflux", "768p") == "otherowner/pyramid-flow-miniflux"
    Path("otherowner/pyramid-flow-miniflux").mkdir(parents=True)
    assert published_of("otherowner/pyramid-flow-miniflux", "768p") is not None


@pytest.mark.parametrize("value", ["abc", "0", "nan", "inf"])
@pytest.mark.parametrize("option", ["--videos-per-minute", "--share"])
def test_a_number_that_does_not_fit_is_told_of(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("--gpu", "H200", option, value)
    assert f"argument {option}: {value}: must be a number above 0" in capsys.readouterr().err


def test_the_settings_that_a_plan_rests_on_are_named_first(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--videos-per-minute", "1", "--seconds", "1", "--gpu", "H200")
    pools = ROOT / "k8s" / "overlays" / "pools"
    for base, settings in (((), "the app's defaults"), (("--base", str(pools)), f"of {pools}")):
        assert plan(*load, *base) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"Settings: {settings}"
        assert plan(*load, *base, "--json") == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["num_gpus"] > 0
        assert printed.err == f"Settings: {settings}\n"


def test_a_base_that_cannot_be_written_over_is_refused_before_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--base", str(ROOT / "k8s" / "overlays" / "dev"), "--write", str(tmp_path / "planned"))
    assert plan("--videos-per-minute", "1", "--gpu", "H200", *base) == 2
    printed = capsys.readouterr()
    assert "groups of workers text, denoise, decode" in printed.err
    assert printed.out == ""


def test_a_bench_is_known_by_the_name_that_the_base_gives_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(BENCH.read_text())
    content["plan"]["model"] = "demo"
    (tmp_path / "bench.json").write_text(json.dumps(content))
    load = ["plan", "--bench", "bench.json", "--videos-per-minute", "5", "--seconds", "2"]
    assert main(load) == 2
    assert "--bench bench.json: of the model demo, but --model is shapes" in capsys.readouterr().err
    pools = "text_encoder: {}, denoiser: {}, decoder: {}"
    config = f"applications: [{{args: {{models: [{{source: shapes, name: demo, {pools}}}]}}}}]"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "serve_config.yaml").write_text(config)
    assert main([*load, "--base", "base"]) == 0


def test_a_bench_of_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(BENCH.read_text())
    content["plan"]["family"] = "pia"
    (tmp_path / "bench.json").write_text(json.dumps(content))
    assert main(["plan", "--bench", "bench.json", "--videos-per-minute", "5"]) == 2
    assert "of the family pia, but --model is of pyramid_flow" in capsys.readouterr().err
