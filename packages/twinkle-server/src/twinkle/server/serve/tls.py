"""Checks TLS certificates before anything is started with them."""

from __future__ import annotations

import ssl
from pathlib import Path

from twinkle.protocol.errors import InvalidRequest


def check_tls(certificate: Path, key: Path) -> None:
    """
    Raises:
        InvalidRequest: if the files can't be read, or aren't a certificate and its key.
    """
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise InvalidRequest(
                f"server.{name}: {path} can't be read ({error.strerror}); give a PEM file that the user who starts the "
                "server may read"
            ) from error
    try:
        # Empty passphrase: an encrypted key is refused, instead of asking for its passphrase on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"server.tls_certificate, server.tls_key: {certificate} and {key} can't be used together ({error}); give a "
            "certificate and its own key, both in PEM, and the key without a passphrase"
        ) from error
