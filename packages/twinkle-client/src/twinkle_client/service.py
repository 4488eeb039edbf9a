"""The service client of a remote server."""

from typing import Any

from twinkle.verbs.service import ServiceClientBase
from twinkle_client.http_channel import HttpChannel
from twinkle_client.settings import resolve


class ServiceClient(ServiceClientBase):
    """A Twinkle server, reached over HTTP."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        user_metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            base_url: the server; if None, that of `init_twinkle_client`, then `TWINKLE_BASE_URL`, then
                http://localhost:8000.
            api_key: likewise, with `TWINKLE_API_KEY`; a server in open mode needs none.
            user_metadata: kept with the session.
        """
        settings = resolve(base_url, api_key)
        self.base_url = settings.base_url
        super().__init__(HttpChannel(settings), user_metadata)
