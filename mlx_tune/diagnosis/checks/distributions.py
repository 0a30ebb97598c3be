"""Which of MLX's distributions are installed, read from their metadata; nothing of them is imported."""

from __future__ import annotations

import base64
import hashlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

#: The distributions that bring a `libmlx`.
BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")
#: How MLX names the extras that install them on Linux.
EXTRAS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13", "mlx-cuda": "cuda"}
#: Puts every file of MLX and its backend there once more. One of them alone would not: older backends brought files of
#: `mlx` too, which go when they are replaced. Filled in by `with_backend`.
AGAIN = "uv pip install --force-reinstall {mlx_with_its_backend}"
_LIBRARIES = ("libmlx.so", "libmlx.dylib", "mlx.dll")


@dataclass(frozen=True)
class Installed:
    """One distribution as its metadata describes it.

    Attributes:
        name: Lower case, with hyphens.
        version: Its version.
        tags: The wheel's platform tags, such as "macosx_14_0_arm64".
        location: The folder that it is installed into.
        hashes: For each file of interest, the sha256 that RECORD gives (urlsafe base64 without padding).
        files: Every file that RECORD lists below the folder, relative to it; those that Python makes left out.
    """

    name: str
    version: str
    tags: tuple[str, ...]
    location: Path
    hashes: dict[str, str]
    files: tuple[str, ...] = ()


def installed(paths: Sequence[str] | None = None) -> dict[str, Installed]:
    """MLX, its backends, mlx-lm and both that install a package `mlx_tune`, as far as they are there.

    Args:
        paths: The folders to look into; `sys.path` by default. As for imports, the first decides.
    """
    wanted = {"mlx", "mlx-lm", "mlx-tune", "mlx-tune-kit", "numpy", "transformers", *BACKENDS}
    found: dict[str, Installed] = {}
    for distribution in metadata.distributions(path=list(sys.path if paths is None else paths)):
        if distribution.read_text("METADATA") is None and distribution.read_text("PKG-INFO") is None:
            continue  # what an interrupted uninstall leaves
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in wanted and name not in found:
            found[name] = _read(name, distribution)
    return found


def _read(name: str, distribution: metadata.Distribution) -> Installed:
    tags = [
        line.split(":", 1)[1].strip() for line in (distribution.read_text("WHEEL") or "").splitlines() if "Tag:" in line
    ]
    hashes, files = {}, []
    for line in (distribution.read_text("RECORD") or "").splitlines():
        path, digest, *_ = *line.rsplit(",", 2), ""
        if path and not path.endswith(".pyc") and not path.startswith(".."):
            files.append(path.strip('"'))
        if path.rsplit("/", 1)[-1] in (*_LIBRARIES, "__init__.py") and digest.startswith("sha256="):
            hashes[path] = digest.removeprefix("sha256=")
    platforms = tuple(tag.rsplit("-", 1)[-1] for tag in tags)
    location = Path(str(distribution.locate_file("")))
    return Installed(name, distribution.version, platforms, location, hashes, tuple(files))


def missing(one: Installed) -> list[str]:
    """The files that a distribution brought and that are gone.

    Those that only matter to who builds an extension of MLX are no loss: images of containers leave them out.
    """
    needed = [
        file for file in one.files if not file.startswith(("mlx/include/mlx/", "mlx/include/metal", "mlx/share/"))
    ]
    return [file for file in needed if not (one.location / file).exists()]


def owners(path: str, distributions: Sequence[Installed]) -> list[str]:
    """Which of the distributions that claim a file it really comes from.

    Args:
        path: The file, relative to site-packages, as RECORD writes it.
        distributions: Who may claim it.

    Returns:
        The names of those whose RECORD has the hash of the file that is there; none where the file is not.
    """
    claims = [one for one in distributions if path in one.hashes]
    actual = _sha256(claims[0].location / path) if claims else None
    return [one.name for one in claims if one.hashes[path] == actual]


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def library_path(one: Installed) -> str | None:
    """The `libmlx` that a backend brings, relative to site-packages."""
    return next((path for path in one.hashes if path.rsplit("/", 1)[-1] in _LIBRARIES), None)


def with_backend(found: dict[str, Installed], genuine: Sequence[str] = (), nvidia: bool = True) -> dict[str, str]:
    """MLX with its backend, in the version that is there, as `AGAIN` wants it.

    Args:
        found: The installed distributions.
        genuine: Whose `libmlx` is in force: of several backends it is kept.
        nvidia: True where a backend for CUDA is of any use here.
    """
    names = [name for name in BACKENDS if name in found]
    usable = [name for name in names if nvidia or "cuda" not in name] or names
    usable = usable or ["mlx-cpu" if platform.system() == "Linux" else ""]
    keep = next((name for name in genuine if name in usable), usable[-1])
    extra = f"[{EXTRAS[keep]}]" if keep in EXTRAS else ""  # none brings mlx-metal
    version = f"=={found['mlx'].version}" if "mlx" in found else ""
    return {"mlx_with_its_backend": f"'mlx{extra}{version}'"}
