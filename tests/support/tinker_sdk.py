"""One way of using the Tinker SDK, whichever version is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

SDK_VERSION = tuple(int(part) for part in version("tinker").split(".")[:2])

MODEL = "Qwen/Qwen3.5-4B"


@dataclass(frozen=True)
class Sdk:
    """One way of using the SDK.

    Attributes:
        scheme: of the paths that programs write.
    """

    patched: bool
    base_url: str

    @property
    def scheme(self) -> str:
        return "twinkle" if self.patched else "tinker"

    @property
    def api_key(self) -> str:
        return "a key of any form" if self.patched else "tml-conformance"

    def path(self, path: str) -> str:
        """A path that the server returned, as a program of this kind would write it."""
        return path.replace("tinker://", f"{self.scheme}://")

    def service(self, **settings: Any) -> Any:
        import tinker

        return tinker.ServiceClient(**settings)

    def rest(self) -> Any:
        return self.service().create_rest_client()


def now(client: Any) -> Any:
    """The client itself: newer SDKs return a future of it, older ones the client."""
    return client.result() if hasattr(client, "result") else client
