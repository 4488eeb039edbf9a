"""Whose request it is: the tenant of its key, or of a token that stands for one."""

from __future__ import annotations

import secrets
from typing import Any, TypeVar

from starlette.requests import Request

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unauthorized
from twinkle.server.keys import KeyRing, audit_scope, describe
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.tokens import JWT_PREFIX, Signer, tenant_of_key

WithAccess = TypeVar("WithAccess", m.LoadWeightsRequest, m.CopyWeightsRequest)


class Authenticator:
    """Reads `X-API-Key` or `Authorization: Bearer`."""

    def __init__(self, signer: Signer, requests: RateLimit, keys: KeyRing | None = None) -> None:
        """
        Args:
            requests: rate limit on requests.
            keys: the valid ones. None is open mode: any key is accepted, and so is none.
        """
        self._signer = signer
        self._requests = requests
        self._keys = keys

    async def tenant_of(self, request: Request) -> str:
        """
        Raises:
            Unauthorized: if the key is not accepted, or the token is not valid (any more).
            Unavailable: if the keys can't be read.
            LimitReached: if the tenant sends too many requests.
        """
        credential = _credential(request)
        if self._keys is None:
            tenant = self._tenant_in_open_mode(credential)
        else:
            tenant = (await self._keys.of_credential(credential, self._signer)).tenant
        request.state.tenant = tenant
        self._requests.check(tenant)
        self._requests.charge(tenant, 1)
        return tenant

    async def check_operator(self, request: Request) -> None:
        """Let in who may see what the whole server does: an admin's key, or anybody in open mode.

        Raises:
            Unauthorized, Unavailable, LimitReached: as `tenant_of`; the first for another's key, too.
        """
        await self.tenant_of(request)
        if self._keys is None:
            return
        key = await self._keys.of_credential(_credential(request), self._signer)
        if key.role != "admin":
            raise Unauthorized("X-API-Key: only a key with the role admin may read this")

    async def exchange(self, request: Request) -> str:
        """A token that stands for the request's key for a while.

        Raises:
            Unauthorized, Unavailable, LimitReached: as `tenant_of`.
        """
        tenant = await self.tenant_of(request)
        if self._keys is None:
            return self._signer.key_token(tenant)
        key = await self._keys.of_credential(_credential(request), self._signer)
        return self._signer.key_token(tenant, key.id)

    async def answer(self, request: Request, query: m.Query[Any]) -> m.Reply | None:
        """The reply to a query about the request's own key; None for any other query, and in open mode.

        Raises:
            Unauthorized, Unavailable: as `tenant_of`.
        """
        if self._keys is None or not isinstance(query, m.GetApiKey | m.DeleteApiKey):
            return None
        key = await self._keys.of_credential(_credential(request), self._signer)
        if isinstance(query, m.GetApiKey):
            return describe(key)
        await self._keys.revoke(key)
        return m.Acknowledged()

    async def audit_scope(self, request: Request, tenant: str, query: m.Query[Any]) -> str:
        """Whose records a query reads: the tenant's, or all tenants' where an admin asks for usage or the audit log.

        Raises:
            Unauthorized, Unavailable: as `tenant_of`.
        """
        if self._keys is None or not isinstance(query, m.GetAuditLog | m.GetUsage | m.GetStorageUsage):
            return tenant
        return audit_scope(await self._keys.of_credential(_credential(request), self._signer))

    async def with_access(self, request: WithAccess) -> WithAccess:
        """The request with its `weights_access_token`, another tenant's key that opens a checkpoint, replaced by a
        signed token, since the service doesn't see keys. A key that is not accepted opens nothing.

        Raises:
            Unavailable: as `tenant_of`.
        """
        if self._keys is None or request.weights_access_token is None:
            return request
        try:
            key = await self._keys.of_credential(request.weights_access_token.strip(), self._signer)
            token = self._signer.key_token(key.tenant, key.id)
        except Unauthorized:
            token = secrets.token_hex(16)  # nobody's
        return request.model_copy(update={"weights_access_token": token})

    def _tenant_in_open_mode(self, credential: str) -> str:
        if not credential.startswith(JWT_PREFIX):
            return tenant_of_key(credential)
        grant = self._signer.read_key_token(credential)
        # The token was made in keys mode: its key can't be looked up any more, and may have been revoked.
        if grant.key_id is not None:
            raise Unauthorized(
                "X-API-Key: this token stands for a key, and this server takes no keys any more"
            )
        return grant.tenant


def _credential(request: Request) -> str:
    key = request.headers.get("x-api-key")
    if not key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else ""
    return key.strip()
