"""API keys made by the operator: a key's holder is its tenant. Only hashes are kept, in the server's database."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, NotFound, Unauthorized, Unavailable
from twinkle.server.config import AuthSection, ServerConfig
from twinkle.server.store.database import Database
from twinkle.server.store.private import private_directory
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import EVERYBODY, ApiKey
from twinkle.server.tokens import JWT_PREFIX, Signer

Role = Literal["user", "admin"]

# The Tinker SDK takes only keys with this prefix.
KEY_PREFIX = "tml-"

# A key that another process revokes stops working within this many seconds.
_REVOKED_WITHIN = 2.0

# After which part of that time keys are read again in the background; how long a later request waits for that; and how
# long the keys read before stay valid if they can't be read.
_READ_AGAIN_AT = 0.5
_READ_SECONDS = 0.25
_GOOD_FOR = 30.0

# An unknown key may have been made a moment ago, so the database is asked once more, but at most this often for all
# waiting requests together: guessing keys can't keep it busy.
_UNKNOWN_AGAIN = 0.1

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_LABEL = 256


def create_key(
    database: Database, tenant: str | None = None, role: Role = "user", label: str | None = None
) -> tuple[ApiKey, str]:
    """A new key's row, and the key, which can't be recovered later.

    Args:
        tenant: whose it is, as are all other keys of that tenant; None: a new one.

    Raises:
        InvalidRequest: if the tenant's name is not allowed, or the label is too long.
    """
    if tenant is not None and not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            f"tenant: {tenant[:80]!r} is no name for one; use up to 64 of letters, digits, '.', '_' and '-', "
            "and a letter or digit first"
        )
    if label is not None and len(label) > _MAX_LABEL:
        raise InvalidRequest(f"label: {len(label)} characters; at most {_MAX_LABEL}")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    row = ApiKey(
        tenant=tenant or "t-" + secrets.token_hex(16),
        role=role,
        sha256=_digest(key),
        label=label,
        created_at=time.time(),
    )
    return database.add_key(row), key


def revoke_key(database: Database, key_id: int) -> ApiKey:
    """
    Raises:
        NotFound: if there is no key with that id.
    """
    row = database.revoke_key(key_id, time.time())
    if row is None:
        raise NotFound(f"key {key_id}: there is none with that id; twinkle-server keys list shows them all")
    return row


def audit_scope(key: ApiKey) -> str:
    """The tenant whose usage and audit log the key may read, or `EVERYBODY`."""
    return EVERYBODY if key.role == "admin" else key.tenant


def describe(key: ApiKey) -> m.ApiKeyInfo:
    return m.ApiKeyInfo(
        key_id=key.id,
        name=key.label or key.tenant,
        note=f"role {key.role}",
        details=m.KeyDetails(
            org_details=m.OrgDetails(name="twinkle"), user_details=m.UserDetails(email=key.tenant)
        ),
    )


def with_auth_mode(config: ServerConfig) -> ServerConfig:
    """The configuration with `auth.mode` set, which holds until the server ends, whatever happens to the keys.

    Revoked keys count too: revoking the last one must not open the server to everybody.
    """
    if config.auth.mode is not None:
        return config
    private_directory(config.storage.directory)
    database = Database(config.storage.url)
    try:
        mode = "keys" if database.keys() else "open"
    finally:
        database.close()
    return config.model_copy(update={"auth": AuthSection(mode=mode)})


class KeyRing:
    """The valid keys, as they were in the database a moment ago.

    All of them are in memory, since they are few: so a wrong key costs no query, and leaves nothing behind.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_digest: dict[str, ApiKey] = {}
        self._by_id: dict[int, ApiKey] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        # A thread of its own, so that authentication never waits for this process's other threads.
        self._thread = ThreadPoolExecutor(1, "twinkle-keys")

    async def of_credential(self, credential: str, signer: Signer) -> ApiKey:
        """The key that a request names, directly or by a token that stands for it.

        Raises:
            Unauthorized: if there is no such key, it was revoked, or the token is not valid (any more).
            Unavailable: if the database can't be read.
        """
        if not credential.startswith(JWT_PREFIX):
            return await self.of_key(credential)
        grant = signer.read_key_token(credential)
        return await self.of_token(grant.key_id, grant.tenant)

    async def of_key(self, key: str) -> ApiKey:
        """
        Raises:
            Unauthorized: if there is no such key, or it was revoked.
            Unavailable: if the database can't be read.
        """
        if not key:
            raise Unauthorized(
                "X-API-Key: this server wants a key, and the request has none; ask whoever runs it for one "
                "(twinkle-server keys create)"
            )
        digest = _digest(key)
        began = time.monotonic()
        await self._be_fresh(began)
        if digest not in self._by_digest:
            await self._read_since(began, self._read_at + _UNKNOWN_AGAIN)
        row = self._by_digest.get(digest)
        # A look-up by hash takes no longer if more of the key is right; the comparison keeps it so.
        if row is None or not hmac.compare_digest(row.sha256, digest):
            raise Unauthorized(
                "X-API-Key: this server doesn't know that key, or it was revoked; ask whoever runs it for another"
            )
        return row

    async def of_token(self, key_id: int | None, tenant: str) -> ApiKey:
        """The key that a token stands for.

        Raises:
            Unauthorized, Unavailable: as `of_key`.
        """
        await self._be_fresh(time.monotonic())
        row = None if key_id is None else self._by_id.get(key_id)
        if row is None or row.tenant != tenant:
            raise Unauthorized("X-API-Key: the key that this token stands for is not valid (any more) here")
        return row

    async def revoke(self, key: ApiKey) -> None:
        revoke = functools.partial(self._database.revoke_key, key.id, time.time())
        await asyncio.get_running_loop().run_in_executor(self._thread, revoke)
        self._read_at = float("-inf")

    async def _be_fresh(self, now: float) -> None:
        """Read the keys again if they are too old. If that takes long, the old ones stay valid for a while: a busy or
        locked database holds nobody up.
        """
        if now < self._read_at + _READ_AGAIN_AT * _REVOKED_WITHIN:
            return
        reading = self._read()
        if now < self._read_at + _REVOKED_WITHIN:
            return  # read ahead of need
        await asyncio.wait([reading], timeout=_READ_SECONDS)
        if self._read_at < now - _GOOD_FOR:
            await self._read_since(now - _REVOKED_WITHIN)

    async def _read_since(self, moment: float, not_before: float = 0.0) -> None:
        """Have the keys as the database had them at `moment` or later; it is not asked before `not_before`.

        Raises:
            Unavailable: if they can't be read.
        """
        while self._read_at < moment:
            reading = self._read(not_before)
            await asyncio.wait([reading])
            reading.result()

    def _read(self, not_before: float = 0.0) -> asyncio.Task[None]:
        """The task that reads the keys: the one under way, or a new one."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_now(not_before))
            self._reading.add_done_callback(self._has_read)
        return self._reading

    def _has_read(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled():
            task.exception()  # those that wait for it get the error

    async def _read_now(self, not_before: float) -> None:
        await asyncio.sleep(max(0.0, not_before - time.monotonic()))
        now = time.monotonic()
        read = functools.partial(self._database.keys, valid_only=True)
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, read)
        except (SQLAlchemyError, DatabaseGone) as error:
            raise Unavailable("the server can't read its keys just now; try again") from error
        self._by_digest = {row.sha256: row for row in rows}
        self._by_id = {row.id: row for row in rows}
        self._read_at = now


def _digest(key: str) -> str:
    # A plain hash is enough: keys are 32 random bytes, which can't be guessed, however fast the hash is.
    # Slow, salted hashes are for passwords.
    return hashlib.sha256(key.strip().encode()).hexdigest()
