"""The Twinkle service. `TwinkleServer.from_config('server_config.yaml').run()` starts it."""

from typing import Any

from twinkle.server._version import __version__

__all__ = ["TwinkleServer", "__version__"]


def __getattr__(name: str) -> Any:
    # Not imported where no server is started: parts of this package are used without one (local mode, a rank).
    if name == "TwinkleServer":
        from twinkle.server.serve.launch import TwinkleServer

        return TwinkleServer
    raise AttributeError(f"module 'twinkle.server' has no attribute {name!r}")
