"""The Dockerfile, its ignore file and the cluster launcher's file: what can be known without building or starting."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.files import INFRA, ROOT, pinned

INSTRUCTIONS = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments on one line."""
    lines = [line for line in (INFRA / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parsed = []
    for line in filter(None, joined.splitlines()):
        name, _, rest = line.partition(" ")
        parsed.append((name, rest))
    return parsed


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_the_dockerfile_has_only_known_instructions_and_starts_from_one_image() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "FROM"
    (image,) = arguments("FROM")
    minor = re.match(r"python:3\.(\d+)-slim", image)
    assert minor
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert int(minor.group(1)) >= int(wanted.removeprefix(">=3."))


def test_everything_that_is_copied_exists_and_is_let_through() -> None:
    ignore = [line for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert ignore[0] == "*"
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for rest in arguments("COPY") for source in rest.split()[:-1]}
    assert copied == let_through
    for source in copied:
        assert (ROOT / source).exists(), source


def test_dependencies_are_pinned_and_their_extras_exist() -> None:
    (install,) = [rest for rest in arguments("RUN") if "--constraint" in rest]
    extras = re.search(r"'\.\[([a-z0-9,]+)\]'", install)
    assert extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.group(1).split(",")) <= known.keys()
    for package in ("torch", "torchvision", "ray", "boto3", "s3fs", "gcsfs"):
        assert pinned(package)
    assert "+cpu" not in pinned("torch")


def test_the_image_has_the_compilers_that_kernels_and_compiled_passes_are_built_with() -> None:
    (packages,) = [rest for rest in arguments("RUN") if "apt-get install" in rest]
    assert {"gcc", "g++", "libc6-dev"} <= set(packages.split())


def test_the_image_runs_as_a_user_without_rights() -> None:
    (user,) = arguments("USER")
    assert int(user) > 0, "by number, so that Kubernetes can tell that it is not root"
    assert any("useradd" in rest and f"--uid {user} " in rest for rest in arguments("RUN"))


@pytest.fixture
def cluster() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text())
    return found


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["max_workers"] == 0
    assert types["gpu-spot"]["max_workers"] == prepared["max_workers"]


def test_ray_refuses_the_cluster_file_with_an_unknown_key(cluster: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        validate_config(prepare_config({**cluster, "idle_timeout": 5}))


def test_every_machine_is_given_the_token_and_the_mode(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_gpu_machines_need_a_named_image_and_are_refused_with_too_old_a_driver(
    cluster: dict[str, Any],
) -> None:
    assert cluster["available_node_types"]["gpu-spot"]["node_config"]["ImageId"] == "ami-FILL-IN"
    text = (INFRA / "ray" / "cluster.yaml").read_text()
    assert re.search(r"# To be filled in: .*driver of 580 or later.*\n.*\n *ImageId: ami-FILL-IN\n", text)
    assert 'python -c "import torch; assert torch.cuda.is_available()' in cluster["worker_start_ray_commands"][0]
