"""Who is asking: the tenant behind a request's key, or behind a token that was given for one."""

from __future__ import annotations

from starlette.requests import Request

from twinkle.server.tokens import JWT_PREFIX, Signer, tenant_of_key


class Doorkeeper:
    """Reads `X-API-Key` or `Authorization: Bearer`. Open mode: any key will do, and so will none."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def tenant_of(self, request: Request) -> str:
        """
        Raises:
            Unauthorized: for a token that is not valid (any more).
        """
        credential = _credential(request)
        if credential.startswith(JWT_PREFIX):
            return self._signer.tenant_of_token(credential)
        return tenant_of_key(credential)

    def exchange(self, request: Request) -> str:
        """A token that stands for the request's key for a while.

        Raises:
            Unauthorized: as `tenant_of`.
        """
        return self._signer.key_token(self.tenant_of(request))


def _credential(request: Request) -> str:
    key = request.headers.get("x-api-key")
    if not key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else ""
    return key.strip()
