"""Packages of kernels for GPUs that models use where they are installed. Nothing is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class KernelPackage:
    """
    Attributes:
        distribution: what is installed.
        extra: of twinkle-server, which brings it; empty if none does.
    """

    distribution: str
    extra: str = ""


# By import name. The second is compiled where it is installed, and so has an extra of its own.
KERNEL_PACKAGES = {
    "fla": KernelPackage("flash-linear-attention", "gpu"),
    "causal_conv1d": KernelPackage("causal-conv1d", "gpu-compiled"),
    "mamba_ssm": KernelPackage("mamba-ssm"),
}


def how_to_install(packages: Sequence[str]) -> str:
    """The arguments of `pip install`, for packages by import name."""
    known = [KERNEL_PACKAGES.get(package, KernelPackage(package)) for package in packages]
    extras = ",".join(sorted(package.extra for package in known if package.extra))
    others = [package.distribution for package in known if not package.extra]
    return " ".join([*([f"'twinkle-server[{extras}]'"] if extras else []), *others])


def describe_installed() -> str:
    """One line for whoever checks a configuration."""
    found: list[str] = []
    missing: list[str] = []
    for package in KERNEL_PACKAGES.values():
        try:
            found.append(f"{package.distribution} {metadata.version(package.distribution)}")
        except metadata.PackageNotFoundError:
            missing.append(package.distribution)
    lines = [", ".join(found) or "none"]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    return f"Packages with kernels for GPUs: {'; '.join(lines)}"
