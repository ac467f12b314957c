"""The Kubernetes files against KubeRay's published fields, the pinned Ray and the config tree."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config import Config, parse_config
from tests.infra.files import INFRA, pinned

SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())


def objects(name: str) -> dict[str, Any]:
    """The objects of a file by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((INFRA / "kuberay" / name).read_text())}


def cluster_specs() -> dict[str, Any]:
    return {
        "raycluster.yaml": objects("raycluster.yaml")["RayCluster"]["spec"],
        "rayjob.yaml": objects("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"],
    }


def job_config() -> Config:
    text = objects("rayjob.yaml")["ConfigMap"]["data"]["prune.yaml"]
    return parse_config(yaml.safe_load(text))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_every_object_has_only_published_fields_of_the_right_types(name: str) -> None:
    for found in objects(name).values():
        jsonschema.validate(found, SCHEMA)


def test_the_schema_notices_a_misspelt_field_and_a_bare_number() -> None:
    good = objects("raycluster.yaml")["RayCluster"]
    misspelt, number = copy.deepcopy(good), copy.deepcopy(good)
    misspelt["spec"]["enableInTreeAutoScaling"] = misspelt["spec"].pop("enableInTreeAutoscaling")
    number["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    for wrong in (misspelt, number):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_ray_of_the_cluster_is_the_one_in_the_image(name: str) -> None:
    assert cluster_specs()[name]["rayVersion"] == pinned("ray")


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_every_volume_that_is_mounted_exists_and_gpus_are_asked_for_whole(name: str) -> None:
    spec = cluster_specs()[name]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_user_of_the_image_may_write_to_the_claim(name: str) -> None:
    (user,) = re.findall(r"^USER (\d+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    spec = cluster_specs()[name]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        security = group["template"]["spec"]["securityContext"]
        assert security["fsGroup"] == int(user)
        assert security["runAsNonRoot"]


def test_the_job_makes_the_cluster_of_the_cluster_file_and_adds_the_config() -> None:
    alone, of_job = cluster_specs()["raycluster.yaml"], copy.deepcopy(cluster_specs()["rayjob.yaml"])
    pod = of_job["headGroupSpec"]["template"]["spec"]
    mount = pod["containers"][0]["volumeMounts"].pop()
    volume = pod["volumes"].pop()
    assert of_job == alone
    assert mount["name"] == volume["name"] == "config"
    assert volume["configMap"]["name"] == objects("rayjob.yaml")["ConfigMap"]["metadata"]["name"]


def test_the_job_runs_the_config_that_is_mounted() -> None:
    job = objects("rayjob.yaml")["RayJob"]["spec"]
    mount = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][-1]
    assert job["entrypoint"] == f"python -m jobs.prune --config {mount['mountPath']}/prune.yaml"
    assert job["backoffLimit"] > 0


def test_what_a_new_cluster_needs_lies_on_the_shared_claim() -> None:
    config = job_config()
    assert config.out.startswith("/data/")
    assert str(config.data.shards).startswith("/data/")


def test_the_job_asks_for_as_many_gpus_as_the_cluster_may_grow_to() -> None:
    group = cluster_specs()["rayjob.yaml"]["workerGroupSpecs"][0]
    engine = job_config().engine
    per_pod = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert engine.workers == group["maxReplicas"] * per_pod
    assert engine.gpus_per_worker == 1
