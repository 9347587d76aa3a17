"""Prometheus beside the runs of this machine: its configuration, its page, and how it is started.

Ray keeps a file with the addresses of a session's metrics and a link to the newest session, so one Prometheus sees
every run that is started after it.

Left out on purpose: alerts, long storage and other machines' clusters, for which a Prometheus of one's own reads the
same file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray import console
from rlhf_ray.config import MonitorConfig, repository_path
from rlhf_ray.monitoring.grafana import dashboard
from rlhf_ray.monitoring.panels import ROWS

TARGETS = "prom_metrics_service_discovery.json"
PAGE = "rlhf_ray.html"
SCRAPE_SECONDS = 5
ADVICE = (
    "prometheus is not installed: take your system's package (apt install prometheus, brew install prometheus) or a "
    "release of https://prometheus.io/download, and put it on PATH"
)


def configuration(session: Path) -> dict[str, Any]:
    """prometheus.yml: whatever Ray's newest session offers, looked up anew every few seconds."""
    every = f"{SCRAPE_SECONDS}s"
    files = {"files": [str(session / TARGETS)], "refresh_interval": every}
    return {
        "global": {"scrape_interval": every, "scrape_timeout": "4s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [files]}],
    }


def page() -> str:
    """The page of the panels, which Prometheus serves and fills."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    rows = {title: [asdict(panel) for panel in panels] for title, panels in ROWS.items()}
    # Prometheus reads the file as a Go template: the legends' braces are written as JSON escapes.
    text = json.dumps(rows).replace("{{", "\\u007b\\u007b").replace("}}", "\\u007d\\u007d").replace("</", "<\\/")
    return template.replace("__ROWS__", text)


def prepare(folder: Path, session: Path) -> None:
    """Write configuration and page below a folder."""
    (folder / "consoles").mkdir(parents=True, exist_ok=True)
    (folder / "libraries").mkdir(exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(session), sort_keys=False), encoding="utf-8")
    (folder / "consoles" / PAGE).write_text(page(), encoding="utf-8")


def watch(config: MonitorConfig) -> None:
    """Run Prometheus until it ends or Ctrl-C, or write Grafana's dashboard.

    Raises ValueError where Prometheus is not installed or can't start.
    """
    if config.grafana:
        config.grafana.write_text(json.dumps(dashboard(), indent=1), encoding="utf-8")
        console.say(f"wrote {config.grafana}: import it in Grafana (Dashboards, New, Import)")
        return
    program = shutil.which("prometheus")
    if program is None:
        raise ValueError(ADVICE)
    folder = repository_path(config.folder)
    prepare(folder, config.session)
    line = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={config.retention}",
        f"--web.listen-address={config.address}",
        f"--web.console.templates={folder / 'consoles'}",
        f"--web.console.libraries={folder / 'libraries'}",
        "--log.level=warn",
    ]
    console.say(f"curves:     http://{config.address}/consoles/{PAGE}")
    console.say(f"Prometheus: http://{config.address}")
    console.say("Ctrl-C ends it; docs/MONITORING.md has what is shown, and Grafana")
    code = subprocess.run(line, check=False).returncode
    if code:
        raise ValueError(f"Prometheus has ended with code {code}; what it said is above")
