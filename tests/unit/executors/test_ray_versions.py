"""Workers of another version are refused, and versions are named."""

from __future__ import annotations

import socket

import pytest
import ray

import mergekit_ray
from mergekit_ray.core.errors import StorageError
from mergekit_ray.executors.ray_cluster import check_version, connect

MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.40.0
    Python: 3.11.2
This process on node 10.0.0.7 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def test_the_same_version_may_work() -> None:
    check_version(mergekit_ray.__version__, "10.0.0.1")


def test_another_is_refused_by_name() -> None:
    with pytest.raises(StorageError) as caught:
        check_version("9.8.7", "10.0.0.1")
    text = str(caught.value)
    assert "9.8.7" in text
    assert mergekit_ray.__version__ in text
    assert "10.0.0.1" in text
    assert "install the same version" in text
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (MISMATCH, ["2.40.0", "2.60.0", "3.11.2", "3.11.7"]),
        ("cannot find a node\nlong explanation", ["cannot find a node"]),
        ("", ["RuntimeError"]),
    ],
)
def test_what_ray_says_of_versions_is_passed_on(said: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:{1}".format(*listener.getsockname())
        with pytest.raises(StorageError, match="cannot connect to Ray") as caught:
            connect(address)
    assert all(part in str(caught.value) for part in told)
    assert "explanation" not in str(caught.value)
