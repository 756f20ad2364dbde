"""Promise: a team publishes nothing but on loopback, keeps no secret in files, and looks safely."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import free_port

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration.launch import prepare_instance
from diffusemix_pipeline.orchestration.trigger import launch

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_only_loopback_is_published_and_secrets_come_from_the_environment():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    for password in re.findall(r"://[^:\s]+:([^@\s]+)@|POSTGRES_PASSWORD: (\S+)", text):
        assert "".join(password) == "${POSTGRES_PASSWORD:?}"
    commands = [str(service.get("command")) for service in COMPOSE["services"].values()]
    assert not any("PASSWORD" in command for command in commands)  # `ps` would show it


def test_only_the_clusters_own_network_reaches_what_its_steps_need():
    text = (ROOT / "deploy" / "compose.cluster.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert services.keys() <= COMPOSE["services"].keys()
    ports = {port for service in services.values() for port in service.get("ports", [])}
    assert ports == {f"${{CLUSTER_ADDRESS:?}}:{port}:{port}" for port in (5432, 5000)}
    for steps in ("code", "daemon"):
        assert services[steps]["environment"] == {
            "RAY_ADDRESS": "${RAY_ADDRESS:?}",
            "DIFFUSEMIX_EXECUTOR": "ray",
            "DIFFUSEMIX_TRACKING__URI": "http://${CLUSTER_ADDRESS:?}:5000",
        }
    allowed = COMPOSE["services"]["mlflow"]["command"].split("--allowed-hosts ")[1]
    assert "${CLUSTER_ADDRESS:-127.0.0.1}:5000" in allowed.split(",")
    assert "PASSWORD" not in text


def test_rays_nodes_are_reached_from_within_and_keep_no_secret_in_files():
    parts = list(yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text()))
    [claim, policy, cluster] = parts
    assert [part["kind"] for part in parts] == [
        "PersistentVolumeClaim", "NetworkPolicy", "RayCluster",
    ]  # fmt: skip
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    chosen = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert policy["spec"]["podSelector"]["matchLabels"] == chosen
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {}}]}]
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert cluster["spec"]["rayVersion"] == locked[1]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    for pod in pods:
        [container] = pod["containers"]
        assert container["image"] == COMPOSE["services"]["code"]["image"]
        assert container["envFrom"] == [{"secretRef": {"name": "diffusemix"}}]
        assert all("value" in one for one in container["env"])
        waits = {one["name"]: one["value"] for one in container["env"]}
        assert int(waits["RAY_JOB_START_TIMEOUT_SECONDS"]) > 24 * 3600
        [volume] = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/project"}]
        assert pod["securityContext"]["runAsUser"] != 0
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    assert gpus == [None, 1, None]
    assert "PASSWORD" not in (ROOT / "deploy" / "kuberay.yaml").read_text()


def test_every_file_that_the_image_is_made_of_is_there():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_a_read_only_server_over_a_code_server_launches_nothing(project):
    """The commands of compose.yaml, on ports of loopback."""
    prepare_instance(project)
    ports = {"code": free_port(), "readonly": free_port()}
    workspace = project.root / "served.yaml"
    served = (ROOT / "deploy" / "workspace.yaml").read_text()
    workspace.write_text(
        served.replace("host: code", "host: 127.0.0.1").replace("4000", str(ports["code"]))
    )

    def start(service: str, port: int) -> subprocess.Popen:
        command = COMPOSE["services"][service]["command"]
        for name, number in (("4000", port), ("3001", port), ("0.0.0.0", "127.0.0.1")):
            command = command.replace(name, str(number))
        command = command.replace("deploy/workspace.yaml", str(workspace))
        return subprocess.Popen(
            [Path(sys.executable).parent / command.split()[0], *command.split()[1:]],
            cwd=project.root,
            env=os.environ | {"DAGSTER_HOME": str(project.root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    servers = [start(service, port) for service, port in ports.items()]
    try:
        deadline, address = time.monotonic() + 180, f"http://127.0.0.1:{ports['readonly']}"
        refused = ""
        while "ermission" not in refused and "authorized" not in refused:
            assert time.monotonic() < deadline, refused
            assert all(server.poll() is None for server in servers)
            time.sleep(2)
            with pytest.raises(UserError) as failed:
                launch(address, "diffusemix", {}, {}, None)
            refused = str(failed.value)
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)
