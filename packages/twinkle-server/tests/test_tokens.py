"""Keys, and the tokens that stand for them and for downloads."""

from __future__ import annotations

import stat
from pathlib import Path

import jwt
import pytest

from twinkle.protocol.errors import NotFound, Unauthorized
from twinkle.server.tokens import JWT_PREFIX, Download, Signer, read_secret, tenant_of_key

SECRET = "s" * 64
FILE = Download("t-1", "tinker://run/weights/name", "adapter_config.json")


def test_a_key_token_is_its_tenant_and_nothing_else():
    signer = Signer(SECRET)
    token = signer.key_token(tenant_of_key("my key"))
    assert token.startswith(JWT_PREFIX)
    assert signer.tenant_of_token(token) == tenant_of_key("my key") != tenant_of_key("my other key")
    with pytest.raises(NotFound):
        signer.read_download(token)
    with pytest.raises(Unauthorized):
        signer.tenant_of_token(signer.download_token(FILE))


def test_what_another_has_signed_or_nobody_is_refused():
    claims = {"sub": "t-1", "aud": "key", "iss": "twinkle", "iat": 1, "exp": 2**33}
    for token in (
        Signer("another" * 8).key_token("t-1"),
        jwt.encode(claims, None, "none"),  # pyright: ignore[reportArgumentType]
        "eyJ.not.one",
    ):
        with pytest.raises(Unauthorized, match="not valid"):
            Signer(SECRET).tenant_of_token(token)


def test_a_token_ends_with_its_time():
    claims = {"sub": "t-1", "aud": "key", "iss": "twinkle", "iat": 1, "exp": 2}
    with pytest.raises(Unauthorized, match="expired"):
        Signer(SECRET).tenant_of_token(jwt.encode(claims, SECRET, "HS256"))


def test_a_download_is_what_was_signed():
    signer = Signer(SECRET)
    assert signer.read_download(signer.download_token(FILE)) == FILE


def test_the_secret_is_made_once_and_kept_from_others(tmp_path: Path):
    first = read_secret(tmp_path / "secret")
    assert len(first) == 64 and read_secret(tmp_path / "secret") == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "other") != first
