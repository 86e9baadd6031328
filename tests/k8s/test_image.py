"""The image: what it installs is what pyproject.toml asks for, and what it copies is there."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.k8s.manifests_at_hand import K8S, ROOT

LOCK = K8S / "image" / "requirements.txt"
DOCKERFILE = K8S / "image" / "Dockerfile"
EXTRAS = ("azure", "gcs", "otel", "s3")
AGAIN = "update it with the command that it begins with"


def asked_for() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def locked() -> Iterator[tuple[str, str, list[str]]]:
    """Name, version, and what asked for it."""
    for match in re.finditer(r"^(\S+)==(\S+)\n((?: +#.*\n)*)", LOCK.read_text(), re.MULTILINE):
        yield match[1], match[2], re.findall(r"[\w.-]+(?: \([\w.]+\))?", match[3].replace("via", ""))


def test_the_lock_has_a_version_of_each_dependency_that_pyproject_allows() -> None:
    versions = {name: version for name, version, _ in locked()}
    for name, requirement in asked_for().items():
        assert name in versions, f"{name} is not in {LOCK}; {AGAIN}"
        assert requirement.specifier.contains(versions[name]), f"{requirement}: {versions[name]} is locked; {AGAIN}"


def test_nothing_is_locked_that_nobody_asks_for_any_more() -> None:
    direct = {name for name, _, because in locked() if "pyramid-serve (pyproject.toml)" in because}
    assert direct == asked_for().keys(), AGAIN


def test_the_lock_was_made_for_the_python_and_the_extras_of_the_image() -> None:
    command = LOCK.read_text().splitlines()[1]
    assert all(f"--extra {extra}" in command for extra in EXTRAS)
    assert "--python-version 3.11" in command and "-py311" in DOCKERFILE.read_text()


def test_the_image_starts_from_the_ray_that_is_locked() -> None:
    (version,) = (version for name, version, _ in locked() if name == "ray")
    assert f"ARG RAY_IMAGE=rayproject/ray:{version}-py311" in DOCKERFILE.read_text()


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_there_is_a_stage_for_cpus_and_one_for_gpus(stage: str) -> None:
    assert f"FROM ray AS {stage}\n" in DOCKERFILE.read_text()


def test_what_the_image_copies_is_there_and_sent_to_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY --chown=ray:users (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_runs_as_the_user_ray() -> None:
    users = re.findall(r"^USER (\w+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert users == ["root", "ray"]
