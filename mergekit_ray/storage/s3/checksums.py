"""Checksums of what is sent to S3, so that a body that is damaged on its way is refused.

boto3 would send them as a trailer of a chunked body over HTTPS, which servers that are not Amazon's often refuse; as a
header they are ignored by those that do not know them. A multipart upload must name its algorithm when it is begun, and
every part's checksum when it is completed.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
"""

from __future__ import annotations

import base64
import zlib
from typing import Any


class Checksums:
    """What to add to requests.

    Args:
        client: a boto3 S3 client. With ``request_checksum_calculation`` (``AWS_REQUEST_CHECKSUM_CALCULATION``)
            ``when_required`` nothing is added.
    """

    def __init__(self, client: Any) -> None:
        self._are_sent = client.meta.config.request_checksum_calculation != "when_required"

    def of_body(self, body: bytes | bytearray) -> dict[str, str]:
        """CRC32 of a body, for the request that sends it and for the list of an upload's parts."""
        if not self._are_sent:
            return {}
        return {"ChecksumCRC32": base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()}

    @property
    def of_upload(self) -> dict[str, str]:
        """What the beginning of a multipart upload says of its parts."""
        return {"ChecksumAlgorithm": "CRC32"} if self._are_sent else {}
