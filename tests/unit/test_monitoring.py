"""What a run tells Prometheus, and the pages that show it: one list, one set of panels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config import MonitorConfig
from rlhf_ray.monitoring import prometheus
from rlhf_ray.monitoring.grafana import dashboard
from rlhf_ray.monitoring.metrics import LABELS, METRICS
from rlhf_ray.monitoring.panels import ROWS

EXPORTED = {metric.exported for metric in METRICS}
QUERIES = [line.query for panels in ROWS.values() for panel in panels for line in panel.lines]


def test_the_document_lists_every_metric_with_its_meaning(repository: Path) -> None:
    text = (repository / "docs" / "MONITORING.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(ray_\w+)` \| (.+?) \|", text, flags=re.MULTILINE))
    assert documented == {metric.exported: metric.meaning for metric in METRICS}


def test_names_end_in_their_unit() -> None:
    units = "step|seconds|second|mean|nats|ratio|tokens|updates|restarts|jobs|bytes|total"
    assert all(re.fullmatch(rf"ray_rlhf_[a-z_]*?({units})", name) for name in EXPORTED)


def test_panels_ask_for_metrics_that_are_there_and_miss_none() -> None:
    asked = {name for query in QUERIES for name in re.findall(r"ray_rlhf_\w+", query)}
    assert asked <= EXPORTED
    assert EXPORTED - asked == {"ray_rlhf_step_seconds", "ray_rlhf_busy_seconds"}
    assert all('run="$run"' in query for query in QUERIES)
    used = {
        label
        for panels in ROWS.values()
        for p in panels
        for line in p.lines
        for label in re.findall(r"\{\{(\w+)", line.legend)
    }
    assert used <= set(LABELS)


def test_grafana_gets_the_same_panels_side_by_side() -> None:
    made = json.loads(json.dumps(dashboard()))
    graphs = [panel for panel in made["panels"] if panel["type"] == "timeseries"]
    assert [target["expr"] for panel in graphs for target in panel["targets"]] == QUERIES
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]}
    assert len(places) == len(made["panels"]) == len({panel["id"] for panel in made["panels"]})
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "run"]


def test_prometheus_is_pointed_at_rays_newest_session_and_given_the_page(tmp_path: Path) -> None:
    prometheus.prepare(tmp_path, Path("/tmp/ray/session_latest"))
    scrape = yaml.safe_load((tmp_path / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    assert scrape["file_sd_configs"][0]["files"] == ["/tmp/ray/session_latest/prom_metrics_service_discovery.json"]
    page = (tmp_path / "consoles" / "rlhf_ray.html").read_text(encoding="utf-8")
    assert "{{" not in page, "Prometheus would take it for a template"
    rows = re.search(r"const ROWS = (.*);\n", page)
    assert rows and json.loads(rows[1])["How fast is it?"][0]["title"] == "Step"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "the page needs no network"


def test_a_machine_without_prometheus_is_told_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt install prometheus"):
        prometheus.watch(MonitorConfig(folder=tmp_path / "monitor"))
    prometheus.watch(MonitorConfig(grafana=tmp_path / "dashboard.json"))
    assert json.loads((tmp_path / "dashboard.json").read_text(encoding="utf-8")) == dashboard()
