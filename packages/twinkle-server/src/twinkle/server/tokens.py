"""Whose a key is, and signed tokens (JWT, RFC 7519) that stand for a key or a download for a while.

In open mode the server accepts any key, and none. The key still decides what one may see: its hash is the tenant. In
keys mode (`twinkle.server.keys`) each key has a tenant. A key itself is never stored.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from twinkle.protocol.errors import NotFound, Unauthorized

KEY_SECONDS = 3600
DOWNLOAD_SECONDS = 3600

# Every JWT begins like this: it is `{"` in base64.
JWT_PREFIX = "eyJ"

_ALGORITHM = "HS256"
_ISSUER = "twinkle"

_MAX_REMEMBERED = 4096
# Fewer, since open mode accepts any key: 64 KiB can be sent for each of these.
_MAX_REMEMBERED_KEYS = 256


@functools.lru_cache(maxsize=_MAX_REMEMBERED_KEYS)
def tenant_of_key(key: str) -> str:
    """The tenant behind an API key in open mode; requests without one share a tenant."""
    return "t-" + hashlib.sha256(b"twinkle-tenant\0" + key.strip().encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Grant:
    """What a key's token says.

    Attributes:
        key_id: of the key that it stands for; None from a server in open mode.
    """

    tenant: str
    key_id: int | None


@dataclass(frozen=True)
class Download:
    """One file that the token's holder may read.

    Attributes:
        tenant: on whose behalf.
        place: a checkpoint, by its full name, or `TOKENIZER`.
        file: its name there, or `ARCHIVE` for all of them in one tar.
        stamp: distinguishes the checkpoint from others that have had this name; of a tokenizer, the model's plain name.
    """

    tenant: str
    place: str
    file: str
    stamp: str = ""


TOKENIZER = "tokenizer"
ARCHIVE = ".tar"


def read_secret(path: Path) -> str:
    """The server's secret, made at the first start; only the file's owner may read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="ascii").strip()
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(new_secret())
    return path.read_text(encoding="ascii").strip()


def new_secret() -> str:
    return secrets.token_hex(32)


class Signer:
    """Makes and reads tokens. Those signed by another server are not accepted."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        # Clients send their token with each request, and reading one costs more than the request: (grant, expiry).
        self._read_before: OrderedDict[str, tuple[Grant, int]] = OrderedDict()

    def key_token(self, tenant: str, key_id: int | None = None) -> str:
        """A token that is accepted in place of the tenant's key for an hour. The SDK requires an `org_id` to show."""
        claims = {"sub": tenant, "org_id": _ISSUER}
        if key_id is not None:
            claims["key"] = str(key_id)
        return self._sign("key", KEY_SECONDS, claims)

    def read_key_token(self, token: str) -> Grant:
        """
        Raises:
            Unauthorized: if the token is not ours, or has expired.
        """
        known = self._read_before.get(token)
        if known is not None and time.time() < known[1]:
            return known[0]
        try:
            claims = self._read("key", token)
            grant = Grant(str(claims["sub"]), int(claims["key"]) if "key" in claims else None)
            self._read_before[token] = grant, int(claims["exp"])
            if len(self._read_before) > _MAX_REMEMBERED:
                self._read_before.popitem(last=False)
            return grant
        except jwt.InvalidTokenError as error:
            raise Unauthorized(
                f"X-API-Key: this token is not valid (any more) here ({error}); get a new one from /api/v1/auth/token"
            ) from error

    def download_token(self, download: Download) -> str:
        claims = {
            "sub": download.tenant,
            "place": download.place,
            "file": download.file,
            "stamp": download.stamp,
        }
        return self._sign("download", DOWNLOAD_SECONDS, claims)

    def read_download(self, token: str) -> Download:
        """
        Raises:
            NotFound: if the token is not ours, or has expired.
        """
        try:
            claims = self._read("download", token)
        except jwt.InvalidTokenError as error:
            raise NotFound(
                f"this download address is not valid (any more): {error}; ask for a new one"
            ) from error
        return Download(
            str(claims["sub"]), str(claims["place"]), str(claims["file"]), str(claims.get("stamp", ""))
        )

    def _sign(self, audience: str, seconds: int, claims: dict[str, str]) -> str:
        now = int(time.time())
        times = {"iat": now, "exp": now + seconds}
        return jwt.encode({**claims, **times, "iss": _ISSUER, "aud": audience}, self._secret, _ALGORITHM)

    def _read(self, audience: str, token: str) -> dict[str, Any]:
        return jwt.decode(
            token,
            self._secret,
            [_ALGORITHM],
            audience=audience,
            issuer=_ISSUER,
            # Another machine may have signed it, whose clock is ahead: then it is from the future.
            options={"require": ["exp", "sub"], "verify_iat": False},
        )


def tenant_of_access_token(token: str, signer: Signer | None) -> str:
    """The tenant whose access token this is: a key, or a token that stands for one.

    Raises:
        Unauthorized: if the signer has not signed it, or it has expired.
    """
    if signer is not None and token.startswith(JWT_PREFIX):
        return signer.read_key_token(token).tenant
    return tenant_of_key(token)
