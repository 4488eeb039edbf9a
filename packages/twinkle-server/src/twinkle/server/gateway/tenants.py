"""Who is asking: the tenant behind an API key.

The server is in open mode: it takes any key, and none. The key still decides what one may see: its hash is the
tenant, and a key itself is never kept.
"""

import hashlib

from starlette.requests import Request


def tenant_of(request: Request) -> str:
    """The tenant of the key in `X-API-Key` or `Authorization: Bearer`; all who send no key are one tenant."""
    key = request.headers.get("x-api-key")
    if not key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else ""
    return "t-" + hashlib.sha256(b"twinkle-tenant\0" + key.strip().encode()).hexdigest()[:32]
