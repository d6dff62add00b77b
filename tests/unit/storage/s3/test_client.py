"""What a client is set to, by the endpoint and by what the user has chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.storage.s3.checksums import Checksums
from mergekit_ray.storage.s3.client import make_client

BODY = b"123456789"
CRC32 = "y/Q5Jg=="  # 0xcbf43926, the check value of CRC-32/ISO-HDLC


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REQUEST_CHECKSUM_CALCULATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def settings() -> dict[str, Any]:
    chosen: dict[str, Any] = make_client("s3://bucket", num_connections=1).meta.config.s3 or {}
    return {name: chosen.get(name) for name in ("addressing_style", "payload_signing_enabled")}


@pytest.mark.parametrize(
    ("endpoint", "addressing", "signing"),
    [
        (None, None, False),
        ("https://s3.eu-west-1.amazonaws.com", None, False),
        ("http://127.0.0.1:9000", "path", None),
        ("https://minio.local", "path", False),
    ],
)
def test_by_endpoint(
    endpoint: str | None, addressing: str | None, signing: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert settings() == {"addressing_style": addressing, "payload_signing_enabled": signing}


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.local")
    chosen = "s3 =\n  addressing_style = virtual\n  payload_signing_enabled = true\n"
    (tmp_path / "config").write_text(f"[default]\n{chosen}")
    found = settings()
    assert found["addressing_style"] == "virtual"
    assert found["payload_signing_enabled"] in (True, "true")


def test_bodies_carry_their_checksum() -> None:
    checksums = Checksums(make_client("s3://bucket", num_connections=1))
    assert checksums.of_body(BODY) == {"ChecksumCRC32": CRC32}
    assert checksums.of_upload == {"ChecksumAlgorithm": "CRC32"}


@pytest.mark.parametrize("by_file", [False, True])
def test_servers_that_know_no_checksums_get_a_signature(
    by_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if by_file:
        (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_required\n")
    else:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    client = make_client("s3://bucket", num_connections=1)
    assert Checksums(client).of_body(BODY) == Checksums(client).of_upload == {}
    assert settings()["payload_signing_enabled"] is None
