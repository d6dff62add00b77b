"""The network policy lets through what a merge needs, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from helm.charts import GIVEN, Manifest, one, pods_of, render, rendered

ON = {"networkPolicy": {"enabled": True}}
LINK_LOCAL = "169.254.0.0/16"


def policy(**values: Any) -> Manifest:
    return dict(one(render({**GIVEN, **ON, **values}), "NetworkPolicy")["spec"])


def ports(rule: Manifest) -> set[int]:
    return {port["port"] for port in rule.get("ports", ())}


@pytest.mark.parametrize("case", ["everything", "existing-cluster", "plain-job"])
def test_it_holds_for_every_pod_both_ways(case: str) -> None:
    manifests = rendered(case)
    spec = one(manifests, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    for each in pods_of(manifests):
        assert spec["podSelector"]["matchLabels"].items() <= each.template["metadata"]["labels"].items(), each.where
    own = [{"podSelector": spec["podSelector"]}]
    assert spec["ingress"][0] == {"from": own}
    assert spec["egress"][0] == {"to": own}


def test_rayjob_default() -> None:
    spec = policy()
    [_, operator] = spec["ingress"]
    assert ports(operator) == {8265}
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    [_, dns, stores] = spec["egress"]
    assert [(port["port"], port["protocol"]) for port in dns["ports"]] == [(53, "UDP"), (53, "TCP")]
    assert ports(stores) == {443}
    assert LINK_LOCAL in stores["to"][0]["ipBlock"]["except"]


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://minio:9000", 9000), ("http://minio", 80), ("https://s3.example.com", 443), ("https://[fd00::1]:9", 9)],
)
def test_port_of_the_store(endpoint: str, port: int) -> None:
    stores = policy(s3={"endpoint": endpoint})["egress"][2]
    assert ports(stores) == {443, port}


def test_plain_job_has_no_visitors() -> None:
    spec = policy(mode="job", podMonitor={"enabled": True})
    assert len(spec["ingress"]) == 1
    assert len(spec["egress"]) == 3


def test_prometheus_and_the_api_server_only_where_they_are_needed() -> None:
    spec = policy(podMonitor={"enabled": True}, autoscaling={"enabled": True})
    assert ports(spec["ingress"][2]) == {8080}
    assert ports(spec["egress"][3]) == {443, 6443}


@pytest.mark.parametrize(
    ("cluster", "port", "peers"),
    [
        ({"name": "shared"}, 8265, [{"podSelector": {"matchLabels": {"ray.io/cluster": "shared"}}}]),
        ({"address": "https://ray.example.com"}, 443, None),
    ],
)
def test_submitter_reaches_the_existing_cluster(cluster: Manifest, port: int, peers: list[Manifest] | None) -> None:
    rule = policy(mode="existing-cluster", existingCluster=cluster)["egress"][2]
    assert ports(rule) == {port}
    assert rule.get("to") == peers
