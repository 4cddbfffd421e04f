"""What made a result: versions, device and command."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
from typing import Any


HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = {name: name for name in ("jax", "optax", "flax", "numpy", "torch")} | {
    "kfac_jax": "kfac-jax",
    "backpack": "backpack-for-pytorch",
    "nngeometry": "nngeometry",
    "laplace.curvature": "laplace-torch",
    "asdl": "asdfghjkl",
    "curvlinops": "curvlinops-for-pytorch",
}


def of(command: str) -> dict[str, Any]:
    """Returns what a reader needs to repeat a cell."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for module, name in PACKAGES.items():
        if module in sys.modules:
            versions[name] = importlib.metadata.version(name)
    device = f"CPU, {os.cpu_count()} cores"
    if "jax" in sys.modules:
        found = sys.modules["jax"].devices()[0]
        device = device if found.platform == "cpu" else found.device_kind
    versions["fsam_optax"] = code()
    return {"command": command, "device": device, "versions": versions}


@functools.cache
def code() -> str:
    """Returns the version of the library: the commit, or a digest of its source."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
        found = subprocess.run(command, cwd=HERE, capture_output=True, check=True)
        return found.stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        parts = sorted((HERE.parent / "fsam_optax").rglob("*.py"))
        digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
        return f"source {digest.hexdigest()[:8]}"
