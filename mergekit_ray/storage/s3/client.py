"""Connecting to S3 by the settings the user already has."""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import urlsplit

from mergekit_ray.storage.s3.faults import explain


@functools.cache
def _loader(data_path: str | None) -> Any:
    """What reads botocore's description of S3, which takes a quarter of a second, for all clients once."""
    from botocore.loaders import create_loader  # noqa: PLC0415

    return create_loader(data_path)


def _suited_to(client: Any) -> dict[str, Any]:
    """Settings for the endpoint that a client has found."""
    settings: dict[str, Any] = {}
    endpoint = urlsplit(client.meta.endpoint_url)
    if "amazonaws.com" not in (endpoint.hostname or ""):
        # Servers that are not Amazon's seldom have a DNS name for each bucket.
        settings["addressing_style"] = "path"
    if endpoint.scheme == "https" and client.meta.config.request_checksum_calculation != "when_required":
        # TLS guards the way and a CRC32 the body; SHA-256 would take more of the processor than all else together.
        settings["payload_signing_enabled"] = False
    return settings


def make_client(uri: str, *, num_connections: int) -> Any:
    """A client with credentials, region and endpoint of the usual chain.

    Args:
        uri: for messages.
        num_connections: most connections kept open.

    Raises:
        StorageError: the settings are contradictory, or name a profile that does not exist.
    """
    # Imported here: boto3 takes a quarter of a second.
    import boto3  # noqa: PLC0415
    import botocore.session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    def connect(s3_settings: Any) -> Any:
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},  # see `storage.s3.faults.retried`
            max_pool_connections=num_connections,
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
            response_checksum_validation="when_required",
            s3=s3_settings or None,
        )
        return session.client("s3", config=config)

    try:
        profile = botocore.session.get_session()
        profile.register_component("data_loader", _loader(profile.get_config_variable("data_path")))
        session = boto3.session.Session(botocore_session=profile)
        chosen = profile.get_scoped_config().get("s3") or {}
        client = connect({})
        settings = {name: value for name, value in _suited_to(client).items() if name not in chosen}
        if settings:
            client = connect(settings)
    except (BotoCoreError, ValueError) as error:
        raise explain(error, doing="connecting", where=uri) from error
    return client
