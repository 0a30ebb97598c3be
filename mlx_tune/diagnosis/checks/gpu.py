"""Checks of the GPU: whether it is a real one, whether this session may use it, whether CUDA can."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence

from mlx_tune import devices
from mlx_tune.diagnosis.check import Finding, check, failed, passed, skipped, warned
from mlx_tune.diagnosis.checks import readings
from mlx_tune.diagnosis.checks.distributions import Installed, installed
from mlx_tune.diagnosis.checks.readings import NvidiaGpu

THEME = "gpu"

#: What each CUDA backend needs of the driver (MLX's installation page), and the CUDA that such a driver offers: a
#: compatibility package lets an older driver offer it too.
_DRIVERS = {"mlx-cuda-12": (550, 54, 14), "mlx-cuda": (550, 54, 14), "mlx-cuda-13": (580,)}
_CUDA = {"mlx-cuda-12": (12, 4), "mlx-cuda": (12, 4), "mlx-cuda-13": (13, 0)}
_CAPABILITY = (7, 5)
#: Which GPUs CUDA sees, by number or name; none of them where it is empty or starts with -1.
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@check(
    "gpu-present",
    THEME,
    remedies={"session": "Run in a terminal of a logged-in user, outside any sandbox."},
    in_child=True,
)
def gpu_present(count: int | None = None, system: str | None = None) -> Finding:
    """MLX sees the GPU that it was installed for.

    A Mac's GPU can be hidden from a session: a sandbox, a daemon or a virtual machine. MLX then falls back to the
    processor, or raises "No Metal device available" (mlx#3397).
    """
    import mlx.core as mx

    system = platform.system() if system is None else system
    if devices.gpu_count() if count is None else count:
        info = mx.device_info(mx.gpu)
        return passed(f"{info.get('device_name', 'a GPU')}, {info.get('architecture', 'of an unknown architecture')}")
    if system == "Darwin":
        return failed("MLX sees no Metal device: everything would run on the processor", "session")
    return skipped("this MLX has no GPU backend, or sees no GPU")


@check(
    "virtual-machine",
    THEME,
    remedies={"real": "Measure speed and memory on real hardware; in a virtual machine only test that things run."},
    in_child=True,
)
def virtual_machine(info: Mapping[str, object] | None = None) -> Finding:
    """The GPU is not a virtual machine's.

    An "Apple Paravirtual device" is slow, has a small working set, lacks features, and MLX turns its heap off there.
    Continuous integration runs on such.
    """
    if info is None:
        import mlx.core as mx

        if not (mx.metal.is_available() and devices.gpu_count()):
            return skipped("there is no Metal device")
        info = mx.device_info(mx.gpu)
    name = str(info.get("device_name", ""))
    if "paravirtual" in name.lower():
        return warned(f"the GPU is an {name!r}: its figures say nothing about a real Mac", "real")
    return passed(f"{name} is a real device")


@check(
    "headless",
    THEME,
    remedies={
        "login": "Log in once at the screen (or turn on automatic login), then use ssh; or run as that user's agent."
    },
)
def headless(
    session: str | None = None,
    variables: Mapping[str, str] | None = None,
    system: str | None = None,
    answers: bool | None = None,
) -> Finding:
    """The session has a screen, or it is known that it has none.

    Over ssh and in daemons macOS may give no GPU until somebody has logged in at the screen. On the other hand, the
    watchdog that ends long work (mlx#3267) guards only a screen that is in use.
    """
    system = platform.system() if system is None else system
    if system != "Darwin":
        return skipped("it makes no difference outside macOS")
    variables = os.environ if variables is None else variables
    session = session or readings.session_type() or "unknown"
    remote = " over ssh" if "SSH_CONNECTION" in variables else ""
    if session in ("Background", "System"):
        if readings.metal_answers() if answers is None else answers:
            return passed(f"a {session} session{remote}, which gets the GPU")
        return warned(f"a {session} session{remote}, which gets no GPU: nobody may be logged in at the screen", "login")
    return passed(f"an {session} session{remote}")


@check(
    "cuda",
    THEME,
    remedies={
        "driver too old": "sudo apt install nvidia-driver-580   # or your distribution's; then restart",
        "no driver, or no GPU": "uv pip uninstall {name} && uv pip install --force-reinstall 'mlx[cpu]'"
        "   # with an NVIDIA GPU install its driver instead",
        "GPU hidden": f"unset {_VISIBLE}   # or name the GPU to use: export {_VISIBLE}=0",
        "driver for CUDA 12 only": "uv pip uninstall {name} && uv pip install --force-reinstall 'mlx[cuda12]'",
        "GPU unused": "uv pip uninstall {name} && uv pip install --force-reinstall 'mlx[cuda12]'",
        "GPU too old": "uv pip uninstall {name} && uv pip install --force-reinstall 'mlx[cpu]'",
    },
)
def cuda(
    found: dict[str, Installed] | None = None,
    gpus: Sequence[NvidiaGpu] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Finding:
    """The NVIDIA driver and GPU are new enough for the CUDA backend.

    `mlx[cuda12]` needs a driver of 550.54.14, `mlx[cuda13]` one of 580 (or an older one with NVIDIA's compatibility
    package), and both a GPU of compute capability 7.5 (Turing) or later.
    """
    found = installed() if found is None else found
    name = next((one for one in _DRIVERS if one in found), None)
    gpus = readings.nvidia_gpus() if gpus is None else gpus
    variables = os.environ if variables is None else variables
    if name is None:
        if gpus:
            return warned(f"there is an {gpus[0].name}, but no CUDA backend of MLX", "GPU unused", {"name": "mlx-cpu"})
        return skipped("no CUDA backend is installed")
    if not gpus:
        return failed(
            f"{name} is installed, but there is no NVIDIA driver with a GPU", "no driver, or no GPU", {"name": name}
        )
    one = gpus[0]
    if variables.get(_VISIBLE, "0")[:1] in ("", "-"):
        return failed(f"{one.name} is hidden: {_VISIBLE}={variables[_VISIBLE]!r}", "GPU hidden")
    driver = f"driver {one.driver}" if one.driver else f"a driver for CUDA {'.'.join(map(str, one.cuda))}"
    if one.capability and one.capability < _CAPABILITY:
        capability = ".".join(map(str, one.capability))
        return failed(f"{one.name} has compute capability {capability}, MLX needs 7.5", "GPU too old", {"name": name})
    if not _serves(one, name):
        needed = ".".join(map(str, _DRIVERS[name]))
        remedy = (
            "driver for CUDA 12 only" if name == "mlx-cuda-13" and _serves(one, "mlx-cuda-12") else "driver too old"
        )
        return failed(f"{driver} is older than the {needed} that {name} needs", remedy, {"name": name})
    return passed(f"{one.name}, {driver}, {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")


def _serves(gpu: NvidiaGpu, name: str) -> bool:
    return readings.version(gpu.driver) >= _DRIVERS[name] or gpu.cuda >= _CUDA[name]
