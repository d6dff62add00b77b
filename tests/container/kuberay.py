"""What KubeRay and a kubelet make of a RayJob, done with podman on hosts that are network namespaces.

Facts are those of KubeRay 1.5 (https://github.com/ray-project/kuberay): how it starts Ray in a pod, which variables it
sets, how it submits. Of the pods, everything is the manifest's: command line, environment, files, users, limits. Where
Kubernetes has names (of services), addresses stand here.
"""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from container.engine import podman
from helm.charts import Manifest, one
from support.servers.hosts import Hosts
from support.waiting import wait_until

TOKEN = "0123456789abcdef0123456789abcdef"
"""Of the cluster; KubeRay draws one where the manifest asks for `token`."""

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_GCS_PORT, _DASHBOARD_PORT, _AGENT_PORT = 6379, 8265, 52365


class Pods:
    """Pods as containers.

    Args:
        manifests: all that the chart rendered; their config maps can be mounted.
        secrets: by name, their keys and values.
        folder: where what is mounted is kept.
        hosts: that pods run on.
    """

    def __init__(
        self, manifests: Sequence[Manifest], secrets: Mapping[str, Mapping[str, str]], folder: Path, hosts: Hosts
    ) -> None:
        self._maps = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}
        self._secrets = secrets
        self._folder = folder
        self._hosts = hosts
        self._names: list[str] = []

    def start(self, name: str, host: int, spec: Manifest, command: str, environment: Mapping[str, str]) -> None:
        """Run a pod's only container."""
        [container] = spec["containers"]
        options = [
            f"--name={name}",
            f"--hostname={name}",
            f"--network=ns:{self._hosts.path(self._hosts.names[host])}",
            *_security(spec, container),
            *_limits(container),
            *(f"--env={key}={value}" for key, value in {**self._environment(container), **environment}.items()),
            *self._mounts(spec, container),
            "--entrypoint=/bin/bash",
        ]
        self._names.append(name)
        started = podman("run", "--detach", *options, container["image"], "-lc", "--", command)
        assert started.returncode == 0, started.stderr.decode()

    def remove_all(self) -> None:
        """End them at once."""
        for name in self._names:
            podman("rm", "--force", "--time=0", name)

    def _environment(self, container: Manifest) -> dict[str, str]:
        found = {}
        for each in container["env"]:
            if "value" in each:
                found[each["name"]] = each["value"]
            else:
                reference = each["valueFrom"]["secretKeyRef"]
                found[each["name"]] = self._secrets[reference["name"]][reference["key"]]
        return found

    def _mounts(self, spec: Manifest, container: Manifest) -> list[str]:
        volumes = {each["name"]: each for each in spec["volumes"]}
        return [self._mount(volumes[each["name"]], each) for each in container["volumeMounts"]]

    def _mount(self, volume: Manifest, mount: Manifest) -> str:
        if "emptyDir" in volume:
            size = _bytes(volume["emptyDir"]["sizeLimit"])
            if mount["mountPath"] == "/dev/shm":
                return f"--shm-size={size}"
            return f"--mount=type=tmpfs,destination={mount['mountPath']},tmpfs-size={size},tmpfs-mode=1777"
        data = self._maps[volume["configMap"]["name"]]
        [item] = [each for each in volume["configMap"]["items"] if each["path"] == mount["subPath"]]
        file = self._folder / volume["configMap"]["name"]
        file.write_text(data[item["key"]])
        return f"--volume={file}:{mount['mountPath']}:ro"


class Cluster:
    """The Ray cluster of a RayJob: a head and its workers, each on a host of its own.

    Args:
        manifests: with the RayJob.
        pods: that are made of it.
        hosts: the head's first, then those of the workers; the last one is the submitter's.
        number: of the attempt: names of containers and of the submission.
    """

    def __init__(self, manifests: Sequence[Manifest], pods: Pods, hosts: Hosts, number: int) -> None:
        self._spec = one(list(manifests), "RayJob")["spec"]
        self._pods, self._hosts, self._number = pods, hosts, number
        self._head = hosts.addresses[0]
        self.submission = f"attempt-{number}"

    def __enter__(self) -> Self:
        cluster = self._spec["rayClusterSpec"]
        head = cluster["headGroupSpec"]
        command = f"ray start --head {_options(head)} {_memory(head)} --dashboard-agent-listen-port={_AGENT_PORT}"
        self._start("head", 0, head, command)
        wait_until(lambda: self._answers("/api/gcs_healthz"), seconds=90, every=0.5)
        [group] = cluster["workerGroupSpecs"]
        for number in range(1, group["replicas"] + 1):
            self.start_worker(number)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pods.remove_all()

    def start_worker(self, number: int, suffix: str = "") -> None:
        """On the host of that number."""
        [group] = self._spec["rayClusterSpec"]["workerGroupSpecs"]
        # The init container that KubeRay puts before it waits for the head, which is there.
        cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
        command = f"ray start --address={self._head}:{_GCS_PORT} --num-cpus={cpus} {_options(group)}"
        self._start(f"worker{suffix}", number, group, command)

    def submit(self) -> None:
        """The submitter's pod."""
        at, job = f"--address http://{self._head}:{_DASHBOARD_PORT}", self.submission
        command = (
            f"if ! ray job status {at} {job} >/dev/null 2>&1; then "
            f"ray job submit {at} --no-wait --submission-id {job} -- {self._spec['entrypoint']}; fi; "
            f"ray job logs {at} --follow {job}"
        )
        template = self._spec["submitterPodTemplate"]
        host = len(self._hosts.names) - 1
        self._pods.start(self._name("submitter", host), host, template["spec"], command, self._variables())

    @property
    def status(self) -> str:
        """Of the job, as KubeRay asks for it; empty while nobody knows."""
        try:
            return str(json.loads(self._get(f"/api/jobs/{self.submission}"))["status"])
        except OSError:
            return ""

    @property
    def said(self) -> str:
        """What the job printed, from Ray."""
        return str(json.loads(self._get(f"/api/jobs/{self.submission}/logs"))["logs"])

    def kill(self, role: str, host: int) -> None:
        """A pod vanishes."""
        done = podman("kill", "--signal=KILL", self._name(role, host))
        assert done.returncode == 0, done.stderr.decode()

    def log(self, role: str, host: int) -> str:
        """What a pod printed."""
        done = podman("logs", self._name(role, host))
        return done.stdout.decode() + done.stderr.decode()

    def inspect(self, role: str, host: int) -> Any:
        """What podman knows of a pod's container."""
        [found] = json.loads(podman("container", "inspect", self._name(role, host)).stdout)
        return found

    def _start(self, role: str, host: int, group: Manifest, command: str) -> None:
        whole = f"ulimit -n 65536; {command} --block"
        name = self._name(role, host)
        self._pods.start(name, host, group["template"]["spec"], whole, self._variables())

    def _name(self, role: str, host: int) -> str:
        return f"{self._hosts.names[host]}-{role}-{self._number}"

    def _variables(self) -> dict[str, str]:
        return {
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ADDRESS": f"{self._head}:{_GCS_PORT}",
            "RAY_IP": self._head,
            "FQ_RAY_IP": self._head,
            "RAY_PORT": str(_GCS_PORT),
            "RAY_DASHBOARD_ADDRESS": f"{self._head}:{_DASHBOARD_PORT}",
            "RAY_JOB_SUBMISSION_ID": self.submission,
        }

    def _get(self, path: str) -> str:
        request = urllib.request.Request(
            f"http://{self._head}:{_DASHBOARD_PORT}{path}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def _answers(self, path: str) -> bool:
        try:
            return "success" in self._get(path)
        except OSError:
            return False


def _options(group: Manifest) -> str:
    return " ".join(f"--{name}={shlex.quote(value)}" for name, value in group["rayStartParams"].items())


def _memory(group: Manifest) -> str:
    """KubeRay tells Ray of the container's limit, unless the manifest says what Ray may use."""
    if "memory" in group["rayStartParams"]:
        return ""
    return f"--memory={_bytes(group['template']['spec']['containers'][0]['resources']['limits']['memory'])}"


def _security(spec: Manifest, container: Manifest) -> list[str]:
    pod, own = spec["securityContext"], container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["privileged"] is False
    options = [f"--user={pod['runAsUser']}:{pod['runAsGroup']}", "--security-opt=no-new-privileges"]
    options += [f"--cap-drop={name}" for name in own["capabilities"]["drop"]]
    if own["readOnlyRootFilesystem"]:
        options += ["--read-only", "--read-only-tmpfs=false"]
    return options


def _limits(container: Manifest) -> list[str]:
    limits = container["resources"]["limits"]
    options = [f"--memory={_bytes(limits['memory'])}"]
    return [*options, f"--cpus={limits['cpu']}"] if "cpu" in limits else options


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]
