"""Who is asking: the tenant behind a request's key, or behind a token that was given for one."""

from __future__ import annotations

import secrets
from typing import Any, TypeVar

from starlette.requests import Request

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unauthorized
from twinkle.server.keys import KeyRing
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.store.tables import EVERYBODY, ApiKey
from twinkle.server.tokens import JWT_PREFIX, Signer, tenant_of_key

T = TypeVar("T")


class Doorkeeper:
    """Reads `X-API-Key` or `Authorization: Bearer`."""

    def __init__(self, signer: Signer, requests: RateLimit, keys: KeyRing | None = None) -> None:
        """
        Args:
            requests: how many are let in.
            keys: those that are let in. None is open mode: any key will do, and so will none.
        """
        self._signer = signer
        self._requests = requests
        self._keys = keys

    async def tenant_of(self, request: Request) -> str:
        """
        Raises:
            Unauthorized: for a key that is not let in, or a token that is not valid (any more).
            Unavailable: if the keys can't be read.
            LimitReached: for a request too many.
        """
        if self._keys is None:
            tenant = self._open(_credential(request))
        else:
            tenant = (await self._key(self._keys, _credential(request))).tenant
        self._count(tenant)
        return tenant

    def _count(self, tenant: str) -> None:
        self._requests.check(tenant)
        self._requests.charge(tenant, 1)

    async def exchange(self, request: Request) -> str:
        """A token that stands for the request's key for a while.

        Raises:
            Unauthorized, Unavailable, LimitReached: as `tenant_of`.
        """
        tenant = await self.tenant_of(request)
        if self._keys is None:
            return self._signer.key_token(tenant)
        return self._signer.key_token(tenant, (await self._key(self._keys, _credential(request))).id)

    async def answer(self, request: Request, query: m.Query[Any]) -> m.Reply | None:
        """What is asked of the request's own key; None if that is not what is asked, or no keys are kept.

        Raises:
            Unauthorized, Unavailable: as `tenant_of`.
        """
        if self._keys is None or not isinstance(query, m.GetApiKey | m.DeleteApiKey):
            return None
        key = await self._key(self._keys, _credential(request))
        if isinstance(query, m.GetApiKey):
            return _described(key)
        await self._keys.revoke(key)
        return m.Acknowledged()

    async def asked_of(self, request: Request, tenant: str, query: m.Query[Any]) -> str:
        """Whose the answer is: the tenant's own, or everybody's where an admin asks what was used or done.

        Raises:
            Unauthorized, Unavailable: as `tenant_of`.
        """
        if self._keys is None or not isinstance(query, m.GetAuditLog | m.GetUsage | m.GetStorageUsage):
            return tenant
        key = await self._key(self._keys, _credential(request))
        return EVERYBODY if key.role == "admin" else tenant

    async def with_access(self, request: T) -> T:
        """The request with its `weights_access_token`, another's key that opens a checkpoint, as the service reads it:
        as a signed token, since the service knows no keys. One that is not let in opens nothing.

        Raises:
            Unavailable: as `tenant_of`.
        """
        if self._keys is None or not isinstance(request, m.LoadWeightsRequest | m.CopyWeightsRequest):
            return request
        if request.weights_access_token is None:
            return request
        try:
            key = await self._key(self._keys, request.weights_access_token.strip())
            token = self._signer.key_token(key.tenant, key.id)
        except Unauthorized:
            token = secrets.token_hex(16)  # nobody's
        return request.model_copy(update={"weights_access_token": token})

    def _open(self, credential: str) -> str:
        if not credential.startswith(JWT_PREFIX):
            return tenant_of_key(credential)
        grant = self._signer.read_key_token(credential)
        if (
            grant.key_id is not None
        ):  # the tenant of a key that can't be checked here: it may have been revoked
            raise Unauthorized(
                "X-API-Key: this token stands for a key, and this server takes no keys any more"
            )
        return grant.tenant

    async def _key(self, keys: KeyRing, credential: str) -> ApiKey:
        if not credential.startswith(JWT_PREFIX):
            return await keys.of_key(credential)
        grant = self._signer.read_key_token(credential)
        return await keys.of_token(grant.key_id, grant.tenant)


def _described(key: ApiKey) -> m.ApiKeyInfo:
    return m.ApiKeyInfo(
        key_id=key.id,
        name=key.label or key.tenant,
        note=f"role {key.role}",
        details=m.KeyDetails(
            org_details=m.OrgDetails(name="twinkle"), user_details=m.UserDetails(email=key.tenant)
        ),
    )


def _credential(request: Request) -> str:
    key = request.headers.get("x-api-key")
    if not key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else ""
    return key.strip()
