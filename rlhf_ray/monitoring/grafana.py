"""The panels as a dashboard of Grafana, in the JSON that its provisioning reads.

The model is https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.monitoring.panels import ROWS, Panel

FILE_NAME = "rlhf_ray_grafana_dashboard.json"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"nats": "suffix: nats", "tokens": "suffix: tokens", "tokens/s": "suffix: tokens/s", "updates": "short"}


def dashboard() -> dict[str, Any]:
    """The whole dashboard, with a choice of source and run."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []})
        y += 1
        for i, shown in enumerate(row):
            place = {"x": i % COLUMNS * WIDTH, "y": y + i // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(shown, place))
        y += -(-len(row) // COLUMNS) * HEIGHT
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": "rlhf-ray",
        "title": "rlhf_ray",
        "tags": ["rlhf"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {
        "lineWidth": 2,
        "fillOpacity": 60 if panel.stacked else 0,
        "showPoints": "never",
        "spanNulls": True,
    }
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    targets = [
        {"refId": chr(ord("A") + i), "expr": line.query, "legendFormat": line.legend, "datasource": SOURCE}
        for i, line in enumerate(panel.lines)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": UNITS.get(panel.unit, panel.unit), "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    query = "label_values(ray_rlhf_step, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
    }
