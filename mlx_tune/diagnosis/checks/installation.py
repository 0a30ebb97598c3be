"""Checks of what is installed: Python, MLX's wheels, and what else is called mlx_tune."""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import sys
from collections.abc import Sequence

from mlx_tune import devices
from mlx_tune.diagnosis.check import Finding, check, failed, passed, skipped, warned
from mlx_tune.diagnosis.checks import distributions, readings
from mlx_tune.diagnosis.checks.distributions import Installed, installed

THEME = "installation"
OLDEST_PYTHON = (3, 11)


@check(
    "python",
    THEME,
    remedies={"too old": "uv venv --python 3.12 && uv pip install mlx-tune-kit", "32 bits": "uv python install 3.12"},
)
def python(version: Sequence[int] | None = None, bits: int | None = None) -> Finding:
    """Python is new enough, and a 64-bit one.

    MLX needs Python 3.10 and mlx-lm 3.11. With an older one, pip says that there is "no matching distribution".
    """
    version = tuple(sys.version_info[:3]) if version is None else tuple(version)
    bits = struct.calcsize("P") * 8 if bits is None else bits
    text = ".".join(map(str, version))
    if bits != 64:
        return failed(f"Python {text} has {bits} bits, MLX has wheels for 64 only", "32 bits")
    if version[:2] < OLDEST_PYTHON:
        what = "MLX needs 3.10" if version[:2] < (3, 10) else "mlx-lm needs 3.11"
        return failed(f"Python {text} is too old: {what}", "too old")
    return passed(f"Python {text}, 64 bits")


@check(
    "architecture",
    THEME,
    remedies={
        "under Rosetta": "arch -arm64 zsh -c 'uv python install --reinstall 3.12'   # and a new environment from it",
        "another processor": "Use a Mac with Apple silicon, or Linux on x86_64 or aarch64.",
    },
)
def architecture(system: str | None = None, machine: str | None = None, translated: bool | None = None) -> Finding:
    """Python runs natively on a processor that MLX has wheels for.

    An x86 Python on a Mac with Apple silicon runs under Rosetta: `platform.processor()` says `i386`, and pip finds
    no matching wheel. Intel Macs have no MLX at all.
    """
    system = platform.system() if system is None else system
    machine = platform.machine() if machine is None else machine
    if translated is None:
        translated = devices.sysctl("sysctl.proc_translated") == 1
    if system == "Darwin":
        if translated or (machine != "arm64" and devices.sysctl("hw.optional.arm64") == 1):
            return failed(
                "this Python is built for Intel and runs under Rosetta: MLX needs a native one", "under Rosetta"
            )
        if machine != "arm64":
            return failed(f"MLX has no wheels for Macs with {machine} processors", "another processor")
    elif system != "Linux" or machine not in ("x86_64", "aarch64"):
        return failed(f"MLX has no wheels with a backend for {system} on {machine}", "another processor")
    return passed(f"{system} on {machine}, native")


@check(
    "wheel",
    THEME,
    remedies={
        "wheel for a newer macOS": "Update macOS to {needed} (System Settings > General > Software Update), or: "
        "`uv pip install --force-reinstall mlx`",
        "glibc too old": "Use a newer Linux distribution (Ubuntu 22.04, Debian 12), or build MLX from source.",
        "before macOS 15": "Update macOS to 15 to let memory be wired.",
    },
)
def wheel(
    found: dict[str, Installed] | None = None,
    macos: tuple[int, ...] | None = None,
    glibc: tuple[int, ...] | None = None,
    system: str | None = None,
) -> Finding:
    """The system is new enough for the wheels that are installed.

    A wheel made for a newer macOS fails with "Failed to load the default metallib ... language version 4.0 which is
    not supported on this OS": the tag of the wheel says what it needs. On Linux it is the version of glibc.
    """
    found = installed() if found is None else found
    system = platform.system() if system is None else system
    tags = [(one.name, tag) for one in found.values() for tag in one.tags if one.name.startswith("mlx")]
    if system == "Darwin":
        macos = devices.macos_version() if macos is None else macos
        needed = max((_numbers(tag, "macosx_") for _, tag in tags if tag.startswith("macosx_")), default=(14, 0))
        if macos is None:
            return skipped("the version of macOS is not known")
        here, wanted = ".".join(map(str, macos)), ".".join(map(str, needed))
        if macos < needed:
            return failed(
                f"macOS {here} is older than the {wanted} that the wheels are made for",
                "wheel for a newer macOS",
                {"needed": wanted},
            )
        if macos[0] < 15:
            return warned(f"macOS {here} runs MLX, but cannot keep memory wired", "before macOS 15")
        return passed(f"macOS {here}, the wheels need {wanted}")
    if system != "Linux":
        return skipped(f"there is nothing to compare on {system}")
    glibc = _glibc() if glibc is None else glibc
    needed = max((_numbers(tag, "manylinux_") for _, tag in tags if tag.startswith("manylinux_")), default=(2, 35))
    if not glibc:
        return skipped("this system's C library is not glibc")
    here, wanted = ".".join(map(str, glibc)), ".".join(map(str, needed))
    if glibc < needed:
        return failed(f"glibc {here} is older than the {wanted} that the wheels are made for", "glibc too old")
    return passed(f"glibc {here}, the wheels need {wanted}")


def _numbers(tag: str, prefix: str) -> tuple[int, ...]:
    return tuple(int(part) for part in tag.removeprefix(prefix).split("_")[:2] if part.isdigit())


def _glibc() -> tuple[int, ...]:
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()


@check(
    "mlx-backend",
    THEME,
    remedies={
        "no MLX, Linux": "uv pip install 'mlx-tune-kit[cpu]'   # or [cuda12], [cuda13] with an NVIDIA GPU",
        "no MLX, Mac": "uv pip install mlx-tune-kit",
        "no backend, Linux": "uv pip install 'mlx[cpu]=={version}'   # or mlx[cuda12], mlx[cuda13] with an NVIDIA GPU",
        "no backend, Mac": "uv pip install --force-reinstall 'mlx=={version}'",
    },
)
def mlx_backend(found: dict[str, Installed] | None = None, system: str | None = None) -> Finding:
    """MLX is installed, with a backend.

    `pip install mlx` on Linux brings no backend. Importing then fails with "libmlx.so: cannot open shared object
    file" (mlx#2390); the extra `cpu`, `cuda12` or `cuda13` brings one.
    """
    found = installed() if found is None else found
    system = platform.system() if system is None else system
    if "mlx" not in found:
        return failed("MLX is not installed", "no MLX, Mac" if system == "Darwin" else "no MLX, Linux")
    version = found["mlx"].version
    backends = [found[name] for name in distributions.BACKENDS if name in found]
    own_library = distributions.library_path(found["mlx"]) is not None  # built from source, or before 0.26.5
    if not backends and not own_library:
        return failed(
            f"mlx {version} is installed without a backend: `import mlx.core` cannot find libmlx",
            "no backend, Mac" if system == "Darwin" else "no backend, Linux",
            {"version": version},
        )
    names = ", ".join(f"{one.name} {one.version}" for one in backends) or "its own libmlx"
    return passed(f"mlx {version} with {names}")


@check(
    "mlx-versions",
    THEME,
    remedies={"again": distributions.AGAIN},
)
def mlx_versions(found: dict[str, Installed] | None = None) -> Finding:
    """MLX and its backend have the same version.

    pip lets them differ, and `pip check` says that all is fine; importing then fails with "undefined symbol", or
    works and computes something else. This happens when `mlx` is upgraded without the extra that brought the backend.
    Install both again, not the backend alone: up to 0.32.0 it brought files of `mlx` too, and takes them along when it
    is replaced.
    """
    found = installed() if found is None else found
    if "mlx" not in found:
        return skipped("MLX is not installed")
    version = found["mlx"].version
    others = [found[name] for name in distributions.BACKENDS if name in found]
    wrong = [one for one in others if one.version != version]
    if not wrong:
        return passed(f"all of version {version}") if others else skipped("there is no backend to compare")
    names = ", ".join(f"{one.name} {one.version}" for one in wrong)
    return failed(f"mlx is {version}, but {names}", "again", distributions.with_backend(found))


@check(
    "mlx-files",
    THEME,
    remedies={"again": distributions.AGAIN},
)
def mlx_files(found: dict[str, Installed] | None = None) -> Finding:
    """Every file that MLX's wheels brought is there.

    Wheels of MLX and of its backends write into the same folder. Removing or upgrading one can take away what another
    needs, and pip does not notice.
    """
    found = installed() if found is None else found
    looked_at = [found[name] for name in ("mlx", *distributions.BACKENDS) if name in found]
    if not any(one.files for one in looked_at):
        return skipped("no list of files came with MLX" if looked_at else "MLX is not installed")
    gone = [(one, file) for one in looked_at for file in distributions.missing(one)]
    if not gone:
        return passed(f"{sum(len(one.files) for one in looked_at)} files, none is missing")
    (one, file), more = gone[0], f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return failed(
        f"{file} of {one.name} {one.version}{more} {'are' if more else 'is'} gone",
        "again",
        distributions.with_backend(found),
    )


@check(
    "one-backend",
    THEME,
    remedies={
        "two backends": "uv pip uninstall {names} && uv pip install --force-reinstall {mlx_with_its_backend}",
        "another libmlx, or none": distributions.AGAIN,
    },
)
def one_backend(found: dict[str, Installed] | None = None, nvidia: bool | None = None) -> Finding:
    """Only one backend is installed, and `libmlx` is its own.

    Every backend writes the same file `mlx/lib/libmlx.so`, so that of two the last one installed works, and
    removing either leaves none. RECORD, where a wheel lists the hashes of its files, tells whose file it is.
    """
    found = installed() if found is None else found
    backends = [found[name] for name in distributions.BACKENDS if name in found]
    if not backends:
        return skipped("no backend is installed")
    path = next((p for p in map(distributions.library_path, backends) if p is not None), None)
    genuine = distributions.owners(path, backends) if path else []
    if len(backends) > 1:
        names = [one.name for one in backends]
        whose = f"libmlx comes from {' and '.join(genuine)}" if genuine else "libmlx comes from neither"
        nvidia = bool(readings.nvidia_gpus()) if nvidia is None else nvidia
        values = {"names": " ".join(names), **distributions.with_backend(found, genuine, nvidia)}
        return failed(
            f"{' and '.join(names)} are both installed; {whose}", "two backends", values, figures={"owner": genuine}
        )
    only = backends[0]
    if path and not genuine:
        gone = not (only.location / path).is_file()
        brought = f"{only.name} {only.version} brought"
        text = f"libmlx is gone, although {brought} it" if gone else f"libmlx is not the file that {brought}"
        return failed(text, "another libmlx, or none", distributions.with_backend(found))
    return passed(f"{only.name} alone" + (", libmlx is its own" if genuine else ""), figures={"owner": genuine})


@check(
    "mlx-tune-name",
    THEME,
    remedies={"uninstall": "uv pip uninstall mlx-tune && uv pip install --force-reinstall mlx-tune-kit"},
)
def mlx_tune_name(found: dict[str, Installed] | None = None) -> Finding:
    """The unrelated distribution `mlx-tune` is not in the way.

    This library is distributed as `mlx-tune-kit`. The name `mlx-tune` on PyPI belongs to an unrelated trainer whose
    package is called `mlx_tune` too: whichever was installed last has overwritten the other.
    """
    found = installed() if found is None else found
    if "mlx-tune" not in found:
        return passed("no other distribution brings a package mlx_tune")
    version = found["mlx-tune"].version
    if "mlx-tune-kit" not in found:
        return failed(
            f"mlx-tune {version} is installed, which is another project; this one is mlx-tune-kit", "uninstall"
        )
    return failed(f"mlx-tune {version}, another project, shares the package mlx_tune with mlx-tune-kit", "uninstall")


@check(
    "mlx-import",
    THEME,
    remedies={"known": "{advice}", "again": distributions.AGAIN},
)
def mlx_import(python: str | None = None, environment: dict[str, str] | None = None) -> Finding:
    """`import mlx.core` works, tried in a process of its own.

    Where it does not, the process may die without a Python error, so it is not tried in yours.
    """
    from mlx_tune.diagnosis import explanations

    ended = subprocess.run(
        [python or sys.executable, "-c", "import mlx.core as mx; print(mx.__version__)"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    if ended.returncode == 0:
        return passed(f"mlx.core {ended.stdout.strip()} imports")
    said = _errors(ended.stderr) or f"it ended with code {ended.returncode} and said nothing"
    if ended.returncode < 0:
        said = f"the process was killed by signal {-ended.returncode}. {_errors(ended.stderr)}"
    known = explanations.find(ended.stderr)
    if known:
        return failed(f"import mlx.core fails: {said}", "known", {"advice": known[0].remedies[0]})
    return failed(f"import mlx.core fails: {said}", "again", distributions.with_backend(installed()))


def _errors(text: str) -> str:
    """The errors of a traceback, the first one first: that of an extension only says that there was another."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)] or lines[-1:]
    # C++ names of a missing symbol go on for lines.
    return "; ".join(line if len(line) <= 240 else f"{line[:237]}..." for line in errors)


@check(
    "mlx-lm",
    THEME,
    remedies={"not installed": "uv pip install -U mlx-lm", "broken": "uv pip install -U --force-reinstall mlx-lm"},
    in_child=True,
)
def mlx_lm(name: str = "mlx_lm") -> Finding:
    """mlx-lm can be imported.

    `mlx_tune.lm` and the commands that take `--model` need it; the rest of the library does not.
    """
    import importlib

    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return warned("mlx-lm is not installed: `mlx_tune.lm` will not work", "not installed")
        return failed(f"importing mlx-lm fails: {error}", "broken")
    except ImportError as error:
        return failed(f"importing mlx-lm fails: {error}", "broken")
    return passed(f"mlx-lm {getattr(module, '__version__', 'of an unknown version')} imports")
