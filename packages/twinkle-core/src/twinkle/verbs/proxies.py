"""The proxy that the environment puts between a client and an address; connection errors name it."""

import urllib.request
from urllib.parse import urlsplit, urlunsplit


def proxy_of(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names for an address, without credentials; None if none.

    Read as httpx does: NO_PROXY lists exceptions.
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or _is_excepted(parts.hostname, parts.port, proxies.get("no", "")):
        return None
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))


def through(url: str) -> str:
    """A phrase for error messages that names the proxy, such as " through the proxy ..."; empty if none."""
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    return f" through the proxy {proxy} (of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY; NO_PROXY excepts addresses)"


def _is_excepted(host: str, port: int | None, exceptions: str) -> bool:
    for name in (name.strip().lower() for name in exceptions.split(",")):
        name = name.rpartition("://")[2].lstrip(".")
        if name == "*" or (name and (host == name or host.endswith(f".{name}") or f"{host}:{port}" == name)):
            return True
    return False
