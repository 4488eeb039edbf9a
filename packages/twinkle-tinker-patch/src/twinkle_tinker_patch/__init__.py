"""Runs programs written for the Tinker SDK against a Twinkle server."""

from twinkle_tinker_patch._version import __version__
from twinkle_tinker_patch.patch import init_tinker_client, unpatch
from twinkle_tinker_patch.versions import TESTED_VERSIONS

__all__ = ["TESTED_VERSIONS", "__version__", "init_tinker_client", "unpatch"]
