"""Who sits where, what is refused, what a job takes along, and what a cluster's manifests say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env import packaging
from ray.autoscaler._private.util import prepare_config, validate_config

from deploy import check_manifests
from rlhf_ray import crews
from rlhf_ray.config import PPOConfig, load
from rlhf_ray.config.loader import REPOSITORY
from rlhf_ray.runtime.cluster import _make_token, check_shared, connect, nodes
from rlhf_ray.runtime.placement import NODE_ID, Node, Request, place, refuse


def machine(name: str, cpus: float, gpus: float = 0.0, *, free_gpus: float | None = None, **changes: Any) -> Node:
    free = gpus if free_gpus is None else free_gpus
    return Node(id=name, name=name, cpus=cpus, gpus=gpus, free_cpus=cpus, free_gpus=free, **changes)


HEAD, BIG = machine("head", 2, here=True), machine("big", 8, 1, labels={"card": "big"})
SMALL, CORES = machine("small", 8, 1, labels={"card": "small"}), machine("cores", 16)


def seated(config: PPOConfig, machines: list[Node]) -> dict[str, list[tuple[str, float]]]:
    """Machine and GPU share of every worker."""
    device = crews.device_of_roles(config.device, "cpu", machines)
    seats, lacking = place(crews.requests(config, device), machines)
    assert not lacking
    return {role: [(seat.node.name, round(seat.gpus, 3)) for seat in taken] for role, taken in seats.items()}


def test_packed_workers_share_one_card_and_spread_ones_take_every_machine_in_turn() -> None:
    box = machine("box", 2, 1, here=True)
    packed, _ = place(crews.requests(PPOConfig(), "cuda"), [box, SMALL])
    assert {seat.node.name for seats in packed.values() for seat in seats} == {"box"}
    assert [seat.options["num_gpus"] for seat in packed["rollout"]] == [0.2, 0.2]
    assert packed["rollout"][0].cores == max(1, (os.cpu_count() or 1) // 2)

    equal = [HEAD, machine("a", 4), machine("b", 4)]
    assert seated(PPOConfig(num_rollout_workers=4, rollout_cpus=1.0, placement="spread"), equal) == {
        "rollout": [("a", 0), ("b", 0), ("head", 0), ("a", 0)],
        **{role: [("head", 0)] for role in ("reward", "reference", "learner")},
    }
    beyond = seated(PPOConfig(num_rollout_workers=3, rollout_cpus=1.0), equal)
    assert beyond["rollout"] == [("head", 0), ("a", 0), ("a", 0)] and beyond["learner"] == [("head", 0)]


def test_the_learner_has_the_best_card_and_rollout_workers_what_their_machine_gives() -> None:
    """The head has no GPU: what the others have is what Ray says."""
    config = PPOConfig(
        num_rollout_workers=4,
        placement="spread",
        rollout_device="any",
        rollout_gpus=0.5,
        learner_gpus=1.0,
        labels={"learner": ["card=big"], "rollout": ["card=none"]},
    )
    machines = [HEAD, SMALL, BIG, CORES]
    found = seated(config, machines)
    assert found["learner"] == [("big", 1)] and found["reward"] == found["reference"] == [("small", 0.1)]
    assert found["rollout"] == [("cores", 0), ("small", 0.5), ("big", 0), ("head", 0)]
    seats, _ = place(crews.requests(config, "cuda"), machines)
    assert [own["device"] for own in crews._own(config, seats["rollout"], "cuda")] == ["cpu", "cuda", "cpu", "cpu"]
    (learner,) = seats["learner"]
    assert learner.options["label_selector"] == {NODE_ID: "big"}
    assert learner.options["fallback_strategy"] == [{"label_selector": {"card": "big"}}, {"label_selector": {}}]
    assert seats["reward"][0].options["fallback_strategy"] == [{"label_selector": {}}]


def test_a_share_must_fit_one_card_of_one_machine() -> None:
    halves = [machine("a", 4, 1, free_gpus=0.5), machine("b", 4, 1, free_gpus=0.5)]
    whole = Request(role="learner", count=1, cpus=0.1, gpus=1.0)
    assert place([whole], halves)[1] == {"learner": 1}
    pair = [Request(role="rollout", count=3, cpus=0.1, gpus=0.6)]
    assert place(pair, [machine("two", 4, 2)])[1] == {"rollout": 1}
    assert place([Request(role="learner", count=1, cpus=0.1, gpus=2.0)], [machine("two", 4, 2)])[1] == {}
    assert place([Request(role="rollout", count=3, cpus=0.1)], [machine("a", 0.1 + 0.2)])[1] == {}


def test_what_the_cluster_lacks_is_refused_with_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    connect(need=[])
    (here,) = nodes()
    assert here.here and here.cpus >= 1
    with pytest.raises(ValueError, match=r"can't give 500\.2 CPU \(there are \d+\) and 2 GPU \(there are 0\); ask"):
        connect(
            need=[
                Request(role="rollout", count=2, cpus=250.0),
                Request(role="learner", count=2, cpus=0.1, gpus=1.0),
            ]
        )
    shown = capsys.readouterr().out
    lines = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    assert lines["rollout"] == ["2", "250", "0", "500", "0"] and lines["learner"] == ["2", "0.1", "1", "0.2", "2"]
    assert lines["all"] == ["4", "500.2", "2"] and "(this one)" in shown
    with pytest.raises(
        ValueError, match=r"can't give 1 of 1 learner workers 1\.5 CPU and 0 GPU on any one machine; ask"
    ):
        refuse([Request(role="learner", count=1, cpus=1.5)], [machine("a", 1), machine("b", 1)], {"learner": 1})
    check_shared([tmp_path], [here])
    with pytest.raises(ValueError, match=r"does not see .*absent: models and checkpoints belong on a disk"):
        check_shared([tmp_path / "absent"], [here])


def test_runs_that_start_together_make_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / ".ray" / "auth_token"
    seen: list[str] = []

    def start(_: int) -> None:
        _make_token()
        seen.append(token.read_text(encoding="utf-8"))

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(start, range(50)))
    assert set(seen) == {token.read_text(encoding="utf-8")} and len(seen[0]) == 64
    assert [file.name for file in token.parent.iterdir()] == [token.name] and token.stat().st_mode & 0o777 == 0o600


LISTENERS = """
import os
from contextlib import suppress
from pathlib import Path
from rlhf_ray.runtime.cluster import connect, ray
from tests.hunting import descendants
connect(need=[])
ray.get(ray.remote(lambda: None).remote())  # so that there is a worker
rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
held = set()
for pid in [os.getpid(), *descendants()]:
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile, or closed the file
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                held.add(os.readlink(file))
print("listening:", *{row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held})
"""
"""Says the addresses, as the kernel writes them, of all sockets on which a process and its Ray listen."""


def test_one_box_listens_on_loopback_alone_and_keeps_its_token_to_its_owner(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {**clean, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", LISTENERS], env=env, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("listening: ")]  # Ray may add its own
    found = set(line.split()[1:])
    assert found and found <= {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    assert token.read_text(encoding="utf-8") and token.stat().st_mode & 0o777 == 0o600


def test_a_job_takes_along_the_code_alone_and_keeps_its_results_elsewhere(tmp_path: Path) -> None:
    """Packed by Ray itself, or by the command of docs/CLUSTER.md, which compresses, and run as Ray runs it."""
    package, small, copy = (tmp_path / name for name in ("package.zip", "rlhf_ray.tgz", "runtime_resources"))
    packaging.create_package(str(REPOSITORY), package, include_gitignore=True, excludes=[])
    tar = ["tar", "-czf", str(small), "--exclude=__pycache__", "configs", "launch", "rlhf_ray"]
    subprocess.run(tar, cwd=REPOSITORY, check=True)
    assert small.stat().st_size < 400_000 and package.stat().st_size < 1_200_000
    packaging.untar_package(str(small), str(copy), remove_top_level_directory=False, unlink_tar=True)
    names = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    with zipfile.ZipFile(package) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == names
    assert {name.split("/")[0] for name in names} == {"rlhf_ray", "launch", "configs"}
    assert {"configs/ppo/mini_xl.yaml", "launch/ppo.py"} <= names
    line = [sys.executable, str(copy / "launch" / "ppo.py"), "--num-rollout-workers", "0", "--policy", "nowhere"]
    in_job = {**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "PYTHONPATH": ""}
    for words, complaint in (
        ([], "checkpoints = .*/runtime_resources/checkpoints: a submitted job runs in a copy"),
        (["--checkpoints", str(tmp_path / "shared")], "policy = nowhere: no model there"),
        (["--mirror", str(tmp_path / "mirror")], "policy = nowhere: no model there"),
    ):
        tried = subprocess.run([*line, *words], cwd=copy, env=in_job, capture_output=True, text=True, check=False)
        assert tried.returncode == 2 and re.search(complaint, tried.stderr), tried.stderr


def test_every_cluster_preset_lies_over_every_size() -> None:
    presets = sorted((REPOSITORY / "configs" / "cluster").glob("*.yaml"))
    assert len(presets) == 3
    for preset in presets:
        for size in ("tiny", "mini_xl"):
            files = [str(REPOSITORY / "configs" / "ppo" / f"{size}.yaml"), str(preset)]
            config = load(PPOConfig, [word for file in files for word in ("--config", file)])
            assert config.placement == "spread"
    config = load(PPOConfig, ["--labels.learner", "ray.io/accelerator-type=H100"])
    assert crews.requests(config, "cpu")[0].labels == {"ray.io/accelerator-type": "H100"}


def test_the_manifests_start_one_ray_as_nobody_in_particular_with_tokens() -> None:
    """deploy/check_manifests.py holds the whole of them against KubeRay's own schemas; this holds what they promise."""
    folder = REPOSITORY / "deploy"
    cluster, job = (
        yaml.safe_load((folder / "kuberay" / f"{name}.yaml").read_text()) for name in ("raycluster", "rayjob")
    )
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    (pinned,) = re.findall(r"^ray\[.*\]==(.+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    mixed = load(PPOConfig, ["--config", str(REPOSITORY / "configs" / "cluster" / "mixed.yaml")])
    labels = crews.requests(mixed, "cuda")[1].labels
    for spec in (cluster["spec"], job["spec"]["rayClusterSpec"]):
        assert spec["rayVersion"] == pinned and spec["authOptions"] == {"mode": "token"}
        assert labels in [group["labels"] for group in spec["workerGroupSpecs"]]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
            (container,) = pod["containers"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["volumeMounts"] == [{"name": "checkpoints", "mountPath": "/app/checkpoints"}]
            assert container["resources"]["limits"] == container["resources"]["requests"]
    by_hand = prepare_config(yaml.safe_load((folder / "ray_up.yaml").read_text()))
    validate_config(by_hand)
    assert by_hand["max_workers"] == 2
    image = (folder / "Dockerfile").read_text()
    assert (
        "\nUSER ray\n" in image
        and re.findall("^torch==.*$", (REPOSITORY / "requirements.txt").read_text(), re.M)[0] in image
    )


SCHEMA = """
spec:
  group: ray.io
  names: {kind: RayCluster}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          x-kubernetes-preserve-unknown-fields: true
          properties:
            spec:
              properties: {rayVersion: {type: integer}, headGroupSpec: {}, workerGroupSpecs: {}}
"""
"""A small one of our own: KubeRay's are given by whoever checks."""


def test_a_manifest_that_its_schema_does_not_allow_is_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crd.yaml").write_text(SCHEMA, encoding="utf-8")
    assert check_manifests.main(["--crds", str(tmp_path / "crd.yaml")]) == 1
    cluster, job, storage = capsys.readouterr().out.splitlines()
    assert "raycluster.yaml: RayCluster: spec" in cluster and "rayVersion: '2.60.0' is not of type 'integer'" in cluster
    assert "spec: Additional properties are not allowed ('authOptions' was unexpected)" in cluster
    assert job.endswith("no schema of ray.io/v1 was given") and storage.endswith("not looked at")
