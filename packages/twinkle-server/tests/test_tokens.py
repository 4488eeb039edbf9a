"""Keys, and the tokens that stand for them and for downloads."""

from __future__ import annotations

import datetime
import stat
import time
from pathlib import Path

import jwt
import pytest

from twinkle.protocol.errors import NotFound, Unauthorized
from twinkle.server.tokens import (
    DOWNLOAD_SECONDS,
    JWT_PREFIX,
    KEY_SECONDS,
    Download,
    Grant,
    Signer,
    read_secret,
    tenant_of_key,
)

SECRET = "s" * 64
FILE = Download("t-1", "tinker://run/weights/name", "adapter_config.json")


def test_a_key_token_is_its_tenant_and_nothing_else():
    signer = Signer(SECRET)
    token = signer.key_token(tenant_of_key("my key"))
    assert token.startswith(JWT_PREFIX)
    assert signer.read_key_token(token).tenant == tenant_of_key("my key") != tenant_of_key("my other key")
    with pytest.raises(NotFound):
        signer.read_download(token)
    with pytest.raises(Unauthorized):
        signer.read_key_token(signer.download_token(FILE))


def test_what_another_has_signed_or_nobody_is_refused():
    claims = {"sub": "t-1", "aud": "key", "iss": "twinkle", "iat": 1, "exp": 2**33}
    for token in (
        Signer("another" * 8).key_token("t-1"),
        jwt.encode(claims, None, "none"),  # pyright: ignore[reportArgumentType]
        "eyJ.not.one",
    ):
        with pytest.raises(Unauthorized, match="not valid"):
            Signer(SECRET).read_key_token(token)


def test_a_token_ends_with_its_time():
    claims = {"sub": "t-1", "aud": "key", "iss": "twinkle", "iat": 1, "exp": 2}
    with pytest.raises(Unauthorized, match="expired"):
        Signer(SECRET).read_key_token(jwt.encode(claims, SECRET, "HS256"))


def test_a_download_is_what_was_signed():
    signer = Signer(SECRET)
    assert signer.read_download(signer.download_token(FILE)) == FILE


def test_a_download_ends_with_its_hour(monkeypatch: pytest.MonkeyPatch):
    signer = Signer(SECRET)
    token = signer.download_token(FILE)
    _set_clock(monkeypatch, time.time() + DOWNLOAD_SECONDS - 5)
    assert signer.read_download(token) == FILE
    _set_clock(monkeypatch, time.time() + DOWNLOAD_SECONDS + 5)
    with pytest.raises(NotFound, match="expired"):
        signer.read_download(token)


def test_a_token_that_was_read_before_ends_with_its_hour_too(monkeypatch: pytest.MonkeyPatch):
    signer = Signer(SECRET)
    token = signer.key_token("lab", 3)
    assert signer.read_key_token(token) == signer.read_key_token(token) == Grant("lab", 3)
    _set_clock(monkeypatch, time.time() + KEY_SECONDS + 5)
    with pytest.raises(Unauthorized, match="expired"):
        signer.read_key_token(token)


def test_a_token_of_a_machine_whose_clock_is_ahead_is_taken(monkeypatch: pytest.MonkeyPatch):
    now = time.time()
    _set_clock(monkeypatch, now + 90)
    token = Signer(SECRET).key_token("ada")
    _set_clock(monkeypatch, now)
    assert Signer(SECRET).read_key_token(token).tenant == "ada"


def _set_clock(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # pyright: ignore
            return datetime.datetime.fromtimestamp(now, tz)

    monkeypatch.setattr("jwt.api_jwt.datetime", Clock)
    monkeypatch.setattr("twinkle.server.tokens.time.time", lambda: now)


@pytest.mark.parametrize("part", range(3))
def test_a_token_that_was_changed_anywhere_is_refused(part: int):
    signer = Signer(SECRET)
    parts = signer.download_token(FILE).split(".")
    for place in range(0, len(parts[part]) - 1, 7):
        old = parts[part]
        changed = old[:place] + ("A" if old[place] != "A" else "B") + old[place + 1 :]
        with pytest.raises(NotFound):
            signer.read_download(".".join([*parts[:part], changed, *parts[part + 1 :]]))


def test_the_claims_of_one_download_dont_fit_the_signature_of_another():
    signer = Signer(SECRET)
    other = Download(FILE.tenant, FILE.place, "optimizer.safetensors")
    [header, _, signature], claims = (
        signer.download_token(FILE).split("."),
        signer.download_token(other).split(".")[1],
    )
    with pytest.raises(NotFound):
        signer.read_download(f"{header}.{claims}.{signature}")


def test_the_secret_is_made_once_and_kept_from_others(tmp_path: Path):
    first = read_secret(tmp_path / "secret")
    assert len(first) == 64 and read_secret(tmp_path / "secret") == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "other") != first
