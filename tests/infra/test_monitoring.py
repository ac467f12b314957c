"""The Prometheus and Grafana files: their structure, and that every metric they ask for exists."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml
from ray.util.metrics import Counter, Histogram

from pipeline.engine import metrics
from tests.infra.files import INFRA

DASHBOARD = json.loads((INFRA / "monitoring" / "grafana-dashboard.json").read_text())
FUNCTIONS = {"sum", "rate", "increase", "vector", "histogram_quantile"}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """Our metrics as they appear on the endpoint, with their labels, as metrics.py makes them."""
    made: dict[str, set[str]] = {}

    def recorder(kind: type) -> Any:
        def record(name: str, description: str, *rest: Any) -> None:
            labels = set(rest[-1]) if rest else set()
            suffixes = ("_total",) if kind is Counter else ("_sum", "_count", "_bucket")
            made.update({f"ray_{name}{suffix}": labels for suffix in suffixes})

        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "Counter", recorder(Counter))
        patch.setattr(metrics, "Histogram", recorder(Histogram))
        metrics.WorkerMetrics("0")
        metrics.DriverMetrics()
    return made


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z_]+", expression))


def test_every_metric_of_ours_that_a_panel_asks_for_exists_with_its_labels() -> None:
    ours = exported()
    for expression in expressions():
        for name in names_in(expression):
            if not name.startswith("ray_diffprune"):
                continue
            assert name in ours, expression
            labels = set(re.findall(r'[{,]\s*([a-z_]+)\s*=~?"', expression))
            for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
                labels |= {label.strip() for label in grouped.split(",")}
            assert labels - {"le"} <= ours[name], expression


def test_every_metric_of_ours_is_shown() -> None:
    shown = {re.sub(r"_(total|sum|count|bucket)$", "", name) for text in expressions() for name in names_in(text)}
    assert {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in exported()} <= shown


def test_every_metric_of_rays_is_one_that_rays_own_dashboards_use() -> None:
    known = "".join(path.read_text() for path in Path(inspect.getfile(ray_dashboards)).parent.glob("*.py"))
    for name in {name for text in expressions() for name in names_in(text)}:
        assert name.startswith("ray_diffprune") or re.search(rf"\b{name}\b", known), name


def test_the_queries_are_well_formed() -> None:
    for expression in expressions():
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing), expression
        assert set(re.findall(r"\b([a-z_]+)\(", expression)) <= FUNCTIONS, expression
        for function in ("rate", "increase"):
            assert expression.count(f"{function}(") == len(
                re.findall(rf"\b{function}\([^()]*\[\$__\w+\]\)", expression)
            )


def test_the_dashboard_has_what_grafana_needs_to_import_it() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= DASHBOARD.keys()
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + across, place["y"] + down) for across in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


def test_prometheus_reads_the_list_of_nodes_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    found = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())
    (job,) = found["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


def test_prometheus_in_kubernetes_finds_the_port_that_the_pods_name() -> None:
    found = yaml.safe_load((INFRA / "monitoring" / "prometheus-kubernetes.yml").read_text())
    (job,) = found["scrape_configs"]
    by_label = {rule["source_labels"][0]: rule for rule in job["relabel_configs"]}
    port = by_label["__meta_kubernetes_pod_container_port_name"]
    assert port["action"] == "keep"
    cluster = yaml.safe_load((INFRA / "kuberay" / "raycluster.yaml").read_text())["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        names = {found["name"] for found in group["template"]["spec"]["containers"][0]["ports"]}
        assert port["regex"] in names
