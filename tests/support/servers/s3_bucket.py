"""A place on an S3 server, seen from outside the product."""

from __future__ import annotations

from pathlib import Path

from support.servers.s3_server import S3Server


class Bucket:
    """A prefix of the server's bucket, seen from outside the product."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self.uri = prefix
        self._client = server.client()
        self._bucket, _, self._prefix = prefix.removeprefix("s3://").partition("/")

    def upload(self, folder: Path, name: str) -> str:
        """Copy a folder there; gives its URI."""
        for file in folder.iterdir():
            self._client.upload_file(str(file), self._bucket, f"{self._prefix}/{name}/{file.name}")
        return f"{self.uri}/{name}"

    def keys(self, name: str) -> list[str]:
        """Names of the objects below a folder."""
        prefix = f"{self._prefix}/{name}/"
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        return [found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", [])]

    def download(self, name: str, folder: Path) -> Path:
        """Copy a folder from there."""
        for key in self.keys(name):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._bucket, f"{self._prefix}/{name}/{key}", str(folder / key))
        return folder

    def read(self, name: str, file: str) -> bytes | None:
        """A file of a folder; None if it is not there."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}/{file}")
            body: bytes = answer["Body"].read()
        except self._client.exceptions.NoSuchKey:
            return None
        return body

    def delete(self, name: str) -> None:
        """Remove a folder."""
        for key in self.keys(name):
            self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}/{key}")

    def unfinished(self) -> list[str]:
        """Multipart uploads below the prefix that were neither completed nor aborted."""
        found = self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(f"{self._prefix}/")]
