"""The files in launch/ and docker/: short, clean by linters, valid by the official schemas, true in their claims."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from requirements import lacking

ROOT = Path(__file__).parents[2]
LAUNCH, DOCKER, KUBERNETES = ROOT / "launch", ROOT / "docker", ROOT / "launch" / "kubernetes"
SCRIPTS = sorted(path for folder in (LAUNCH, DOCKER) for path in folder.rglob("*") if path.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted(KUBERNETES.glob("*.yaml"))
# The fields of a RayJob that we use, by KubeRay's API reference; pod templates are checked by Kubernetes' own schema.
RAYJOB_FIELDS = {
    "entrypoint": str,
    "submissionMode": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "rayClusterSpec": dict,
    "submitterPodTemplate": dict,
}
CLUSTER_FIELDS = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
GROUP_FIELDS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert found, f"{name} is in the development group: make env"
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_scripts_are_clean() -> None:
    assert len(SCRIPTS) >= 8
    check(tool("shellcheck"), *SCRIPTS)


def test_the_dockerfile_is_clean() -> None:
    check(tool("hadolint"), DOCKER / "Dockerfile")


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS, *LAUNCH.rglob("cluster.yaml")], ids=lambda path: path.name)
def test_a_launch_file_is_short_and_says_how_it_is_used(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert lines[1 if lines[0].startswith("#!") else 0].startswith("# ")
    if path.suffix in (".sh", ".sbatch"):
        assert path.stat().st_mode & 0o100, "is to be executable"
        assert "set -eu" in path.read_text()


@pytest.mark.parametrize("path", [path for path in SCRIPTS if LAUNCH in path.parents], ids=lambda path: path.name)
def test_a_launch_script_holds_no_setting_of_the_training(path: Path) -> None:
    commands = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not re.findall(r"\b(train|adapter|gate|data|model|eval)\.\w+=", "\n".join(commands))


def test_manifests_are_valid_by_the_schemas_of_kubernetes() -> None:
    check(tool("kubernetes-validate"), "--strict", "--quiet", "--no-warn", *MANIFESTS)


def test_the_ray_job_is_valid_for_kuberay_and_kubernetes(tmp_path: Path) -> None:
    """The Ray job uses fields that KubeRay has and pods that Kubernetes takes."""
    (job,) = documents(KUBERNETES / "sweep.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    spec = job["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for found, known in ((spec, RAYJOB_FIELDS), (spec["rayClusterSpec"], CLUSTER_FIELDS)):
        assert {key: type(value) for key, value in found.items()} == known
    for group in groups:
        assert all(type(value) is GROUP_FIELDS[key] for key, value in group.items())
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    templates = tmp_path / "templates.yaml"
    templates.write_text(
        "---\n".join(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "PodTemplate",
                    "metadata": {"name": f"group-{number}"},
                    "template": template,
                }
            )
            + "\n"
            for number, template in enumerate([*(group["template"] for group in groups), spec["submitterPodTemplate"]])
        )
    )
    check(tool("kubernetes-validate"), "--strict", "--quiet", templates)


@pytest.mark.parametrize("name", ["train.yaml", "sweep.yaml"])
def test_training_pods_are_confined(name: str) -> None:
    """Training pods have a big /dev/shm a plain user and stay behind the network policy."""
    for template in _templates([document["spec"] for document in documents(KUBERNETES / name)]):
        pod = template["spec"]
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            assert container["resources"]["requests"]
        assert template["metadata"]["labels"]["part-of"] == "selora"


def test_no_container_runs_as_root_or_writes_its_image() -> None:
    """Every pod: a plain user, no rights to gain, a root that is read only, behind a network policy, and no token."""
    templates = [template for path in MANIFESTS for template in _templates(documents(path))]
    assert len(templates) == 7
    policies = [one for one in documents(KUBERNETES / "network.yaml") if one["kind"] == "NetworkPolicy"]
    assert {"matchLabels": {"part-of": "selora"}} in [one["spec"]["podSelector"] for one in policies]
    for template in templates:
        pod = template["spec"]
        assert template["metadata"]["labels"]["part-of"] == "selora"
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            locked = {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["securityContext"] == locked
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


def test_compose_locks_its_services_and_publishes_one_port_here() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged") and service.get("network_mode") is None, name
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:5000:5000"]


def test_no_file_that_ships_holds_a_password() -> None:
    """A secret comes from a Kubernetes secret or from docker/.env, and none has a default."""
    secret = re.compile("PASSWORD|SECRET|TOKEN|_KEY")
    for template in [template for path in MANIFESTS for template in _templates(documents(path))]:
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                assert not secret.search(variable["name"]) or "secretKeyRef" in variable["valueFrom"], variable["name"]
    for document in documents(KUBERNETES / "secrets.example.yaml"):
        assert set(document["stringData"].values()) == {""}
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not secret.search(name) or re.fullmatch(r"\$\{\w+(:\?.*)?\}", value), name
    assert not re.search(r"^[A-Z_]+=.", (DOCKER / "env.example").read_text(), re.MULTILINE)


def test_pods_that_track_log_in_to_mlflow() -> None:
    """Trainings and sweeps have a user and a password of MLflow, by a secret that the example has."""
    secrets = {one["metadata"]["name"]: one["stringData"] for one in documents(KUBERNETES / "secrets.example.yaml")}
    assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} == secrets["selora-mlflow"].keys()
    for name in ("train.yaml", "sweep.yaml"):
        for template in _templates(documents(KUBERNETES / name)):
            for container in template["spec"]["containers"]:
                assert {"secretRef": {"name": "selora-mlflow"}} in container["envFrom"]


def _templates(node: Any) -> list[dict[str, Any]]:
    """All pods of a document, under whatever key."""
    if isinstance(node, dict):
        pods = [node[key] for key in ("template", "submitterPodTemplate") if key in node]
        found = [pod for pod in pods if "containers" in pod.get("spec", {})]
        return found + [each for value in node.values() for each in _templates(value)]
    return [each for value in node for each in _templates(value)] if isinstance(node, list) else []


def test_the_ray_cluster_file_is_valid_by_rays_own_schema() -> None:
    from importlib.util import find_spec

    import jsonschema

    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((LAUNCH / "ray" / "cluster.yaml").read_text()), schema)


def test_the_versions_in_the_files_are_those_of_the_lock() -> None:
    lock = (ROOT / "uv.lock").read_text()
    found = re.search(r'name = "ray"\nversion = "([^"]+)"', lock)
    assert found
    (job,) = documents(KUBERNETES / "sweep.yaml")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == found[1]


def test_compose_is_consistent() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= services.keys(), name
        mounts = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert mounts <= compose["volumes"].keys(), name
        assert "healthcheck" in service or name == "mlflow" or service.get("profiles"), name
        if "build" in service:
            assert f"AS {service['build']['target']}" in (DOCKER / "Dockerfile").read_text()
    wanted = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert wanted == given


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        lacking("docker", "docker with its compose plugin is not installed")
    filled = tmp_path / "env"
    filled.write_text("".join(f"{line}x\n" for line in (DOCKER / "env.example").read_text().split() if "=" in line))
    check(docker, "compose", "-f", DOCKER / "compose.yaml", "--env-file", filled, "config", "--quiet")


def test_what_the_dockerfile_copies_gets_into_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert {source for line in copied for source in line.split()} == allowed
