"""Holds KubeRay manifests against KubeRay's own schemas, fields that they don't know refused.

    python deploy/check_manifests.py --crds ray.io_rayclusters.yaml ray.io_rayjobs.yaml

The schemas are in helm-chart/kuberay-operator/crds/ of KubeRay's repository, at the version that the cluster has.  The
exit code is 1 when a manifest is wrong, or of a KubeRay kind whose schema was not given.

Left out on purpose: kinds of Kubernetes itself, such as storage.yaml's, and rules between fields
(x-kubernetes-validations): ``kubectl apply --dry-run=server`` knows both, and needs a cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator  # Ray's own, and the draft that OpenAPI v3.0 is nearest to

KUBERAY = "ray.io/"
MANIFESTS = sorted((Path(__file__).parent / "kuberay").glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    """What a YAML file holds."""
    return [part for part in yaml.safe_load_all(file.read_text(encoding="utf-8")) if part]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that refuses fields which it does not name, as ``kubectl`` does."""
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(made.get(name), dict):
            made[name] = strict(made[name])
    return made


def schemas(crds: Sequence[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The schema of each version and kind that the files define."""
    return {
        (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]): strict(
            version["schema"]["openAPIV3Schema"]
        )
        for file in crds
        for crd in documents(file)
        for version in crd["spec"]["versions"]
    }


def problems(manifest: dict[str, Any], known: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """What is wrong with a manifest of KubeRay's, a line each."""
    version, kind = manifest["apiVersion"], manifest["kind"]
    if (version, kind) not in known:
        return [f"no schema of {version} was given"]
    errors = Draft4Validator(known[version, kind]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path)) or 'itself'}: {error.message}" for error in errors]


def main(argv: Sequence[str] | None = None) -> int:
    """Check every manifest; returns the exit code."""
    options_of = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--crds", nargs="+", type=Path, required=True, help="KubeRay's schemas")
    options_of.add_argument("manifests", nargs="*", type=Path, default=MANIFESTS, help="by default deploy/kuberay/")
    options = options_of.parse_args(argv)
    known, wrong = schemas(options.crds), False
    for file in options.manifests:
        for manifest in documents(file):
            kuberay = manifest["apiVersion"].startswith(KUBERAY)
            found = problems(manifest, known) if kuberay else []
            wrong = wrong or bool(found)
            said = "; ".join(found) or ("valid" if kuberay else "not KubeRay's, not looked at")
            print(f"{file}: {manifest['kind']}: {said}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
