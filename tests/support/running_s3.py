"""An S3 server for tests (moto's), which can be stopped and started again with all that is in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx
import running_server

# For this process's clients and the servers that it starts.
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "twinkle",
    "AWS_SECRET_ACCESS_KEY": "a secret for tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class RunningS3:
    """Listens on loopback; its objects are this process's."""

    def __init__(self) -> None:
        self.port = running_server.free_port()
        self.environment = {**_CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self._server: Any = None
        self._buckets = 0
        os.environ |= self.environment
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def start_if_stopped(self) -> None:
        if self._server is None:
            self.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def new_root(self) -> str:
        """A URL in a bucket of its own."""
        bucket = f"bucket-{self._buckets}"
        self._buckets += 1
        self.client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}/some/prefix"

    @contextmanager
    def asking_for_credentials(self) -> Generator[None]:
        """Nobody's are known then."""
        place = f"http://127.0.0.1:{self.port}/moto-api/reset-auth"
        httpx.post(place, content="0").raise_for_status()
        try:
            yield
        finally:
            httpx.post(place, content="inf").raise_for_status()

    def client(self) -> Any:
        import boto3

        return boto3.client("s3")

    def close(self) -> None:
        self.stop()
        for name in self.environment:
            os.environ.pop(name, None)
