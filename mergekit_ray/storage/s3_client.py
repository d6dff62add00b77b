"""Connecting to S3 by the settings the user already has."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from mergekit_ray.storage.s3_faults import explain


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

    def connect(addressing: Any) -> Any:
        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},  # retries are ours, range by range
            max_pool_connections=num_connections,
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
            response_checksum_validation="when_required",
            s3=None if addressing is None else {"addressing_style": addressing},
        )
        return session.client("s3", config=config)

    try:
        profile = botocore.session.get_session()
        session = boto3.session.Session(botocore_session=profile)
        chosen = (profile.get_scoped_config().get("s3") or {}).get("addressing_style")
        client = connect(chosen)
        host = urlsplit(client.meta.endpoint_url).hostname or ""
        if not chosen and "amazonaws.com" not in host:
            # Servers that are not Amazon's seldom have a DNS name for each bucket.
            client = connect("path")
    except (BotoCoreError, ValueError) as error:
        raise explain(error, doing="connecting", where=uri) from error
    return client
