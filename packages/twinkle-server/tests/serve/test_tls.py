"""HTTPS with a certificate of one's own, by httpx and the native client; what is said before a bad one is used."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from keyed_gateway import KeyedGateway

from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.config import LimitsSection, parse_config
from twinkle.server.gateway.app import create_app
from twinkle.server.keys import KeyRing
from twinkle.server.serve.http import HttpServer
from twinkle.server.serve.tls import check_tls
from twinkle_client import ServiceClient


def make_certificate(directory: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    files = directory / f"{name}.crt", directory / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return files


async def test_https_by_httpx_and_by_the_native_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gateway = KeyedGateway(tmp_path)
    await gateway.service.start()
    certificate, key = make_certificate(tmp_path)
    app = create_app(
        gateway.service,
        LimitsSection(max_request_bytes=2**20),
        gateway.signer,
        keys=KeyRing(gateway.database),
    )
    server = await HttpServer.start(app, "127.0.0.1", 0, (certificate, key))
    port = server._server.servers[0].sockets[0].getsockname()[1]
    url = f"https://127.0.0.1:{port}"
    try:
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(verify=trusting) as http:
            response = await http.get(f"{url}{PREFIX}/healthz")
        assert response.json() == {"status": "ok"}
        assert response.headers["strict-transport-security"].startswith("max-age=")
        async with httpx.AsyncClient() as doubting:
            with pytest.raises(httpx.ConnectError, match=r"CERTIFICATE|certificate"):
                await doubting.get(f"{url}{PREFIX}/healthz")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await asyncio.to_thread(_models, url, gateway.new_key()) == ["fake/model"]
    finally:
        await server.close()
        await gateway.service.close()


def _models(url: str, key: str) -> list[str | None]:
    with ServiceClient(url, api_key=key) as client:
        return [model.model_name for model in client.get_server_capabilities().supported_models]


def test_a_certificate_that_can_not_be_used_is_named(tmp_path: Path):
    certificate, key = make_certificate(tmp_path)
    other = make_certificate(tmp_path, "other")[1]
    check_tls(certificate, key)
    with pytest.raises(InvalidRequest, match=r"server\.tls_certificate: .*none\.crt can't be read"):
        check_tls(tmp_path / "none.crt", key)
    with pytest.raises(InvalidRequest, match=r"server\.tls_key: .*none\.key can't be read"):
        check_tls(certificate, tmp_path / "none.key")
    with pytest.raises(InvalidRequest, match="can't be used together"):
        check_tls(certificate, other)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"passphrase")
    other.write_bytes(
        loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    with pytest.raises(InvalidRequest, match="without a passphrase"):
        check_tls(certificate, other)


def test_half_of_a_certificate_is_refused():
    for name in ("tls_certificate", "tls_key"):
        with pytest.raises(InvalidRequest, match="belong together"):
            parse_config({"model": {"model_id": "x"}, "server": {name: "file.pem"}})
