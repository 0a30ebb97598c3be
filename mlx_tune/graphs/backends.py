"""The three backends' constants: when kernels go to the device, how sizes are rounded, what kernels need besides.

Everything here is data, with the file of MLX (0.32) that it was read from. What was only measured says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_tune.devices import Backend, computes_on_cpu, device_info
from mlx_tune.devices import backend as backend_here
from mlx_tune.errors import InvalidArgumentError


@dataclass(frozen=True)
class CommandRule:
    """The size at which kernels go to the device together, in a command buffer or a CUDA graph.

    Attributes:
        operations: One is handed over when it holds more kernels than these.
        elements: Or when it reads more than so many times 2**20 elements, which MLX calls megabytes.
        distinct: An array counts once a buffer, where it is read or written, and not each time that it is read.
        waits_for_one: The least unit that `eval` waits for is a single operation, not a buffer.
    """

    operations: int
    elements: int
    distinct: bool = False
    waits_for_one: bool = False


@dataclass(frozen=True)
class Rules:
    """One backend, as far as memory goes.

    Attributes:
        name: "metal", "cuda" or "cpu".
        command: When kernels go to the device.
        device: The device that `command` belongs to, in words.
        rounding: Allocations above are rounded up to whole pages of so many bytes; 0 where they are not.
        powers: Smaller ones are rounded up to a power of two.
        units: Processors that a kernel spreads over, where a kernel's working memory depends on it.
        split_tiles: Products of at most so many tiles of 16 x 16 are split along their sum.
        fused: Functions of `mx.fast` that are kernels of their own there.
        measured: The words on how far this was measured.
    """

    name: Backend
    command: CommandRule
    device: str
    rounding: int
    powers: bool
    units: int
    split_tiles: int
    fused: frozenset[str]
    measured: str


#: Buffers that `eval` lets be on their way before it waits for one: MAX_ACTIVE_TASKS in mlx/transforms.cpp.
TASKS_IN_FLIGHT = 10

#: By compute capability: `get_graph_limits` in mlx/backend/cuda/device.cpp.
CUDA_COMMANDS = {
    (8, 0): CommandRule(20, 400),
    (9, 0): CommandRule(100, 1000),
    (10, 0): CommandRule(100, 1000),
    (12, 0): CommandRule(100, 1000),
    (12, 1): CommandRule(20, 25),
}
CUDA_OTHERS = CommandRule(20, 100)

#: By the last letter of the architecture, as in applegpu_g16s: `Device::Device` in mlx/backend/metal/device.cpp.
METAL_COMMANDS = {
    "p": CommandRule(20, 40, distinct=True),
    "g": CommandRule(40, 40, distinct=True),
    "s": CommandRule(50, 50, distinct=True),
    "d": CommandRule(50, 50, distinct=True),
}
METAL_OTHERS = CommandRule(40, 40, distinct=True)

#: DISPATCHES_PER_TASK in mlx/backend/cpu/encoder.h. Buffers go back one by one, as soon as their operation has run.
CPU_COMMAND = CommandRule(9, 1 << 40, waits_for_one=True)

#: `page_size` in mlx/backend/cuda/allocator.cpp; the page of an Apple chip, `vm_page_size` in metal/allocator.cpp.
PAGE = 16384

#: Head widths of Metal's fused attention: `use_fallback` in metal/scaled_dot_product_attention.cpp.
METAL_ATTENTION_WIDTHS = frozenset({64, 72, 80, 96, 128})
#: Widths whose fused attention has a backward kernel, by the names of kernels in the wheel of mlx-metal 0.32.4.
METAL_ATTENTION_VJP_WIDTHS = frozenset({64, 72, 80, 96, 128, 192, 256, 512})
#: `supports_sdpa_cudnn` and `use_fallback` in cuda/scaled_dot_product_attention.cpp: the widest head, and the queries'
#: length that the backward kernel needs a multiple of.
CUDNN_WIDEST, CUDNN_WIDTHS_OF, CUDNN_TILE = 128, 8, 128

#: The workspace of a cuDNN plan or a large product at the least: `allocate_workspace` in cuda/utils.cpp rounds to it.
#: `get_cublas_handles` in cuda/cublas_utils.cpp lets a product take up to 32 MiB on Hopper (4 MiB before); how much of
#: it cuBLAS decides. Measured on an H200: 256 bytes or none, 16 MiB in one of 36 products of the 1 B model.
WORKSPACE = 256
#: Thread blocks that a processor runs of the gradient of `rms_norm`: the occupancy that cuda/rms_norm.cu asks the
#: driver for, as it was measured on an H200 at a width of 2,048 in bfloat16.
RMS_NORM_BLOCKS = 4
#: Multiprocessors of an H100 or H200; how many another GPU has, MLX does not say.
H200_PROCESSORS = 132
#: `min_tmn_threshold` in metal/matmul.cpp, for base and Pro chips and for Max and Ultra.
METAL_SPLIT_TILES, METAL_SPLIT_TILES_LARGE = 1024, 2048
#: `target_groups` in metal/normalization.cpp: rows of the gradient of the weights are summed in so many groups.
METAL_NORM_GROUPS = 512

_FUSED = frozenset({"rms_norm", "layer_norm", "rope", "scaled_dot_product_attention", "cross_entropy"})
_CUDA_MEASURED = "cuda: rules read from MLX's source, compared with what was measured on one H200."
_METAL_MEASURED = "metal: rules read from MLX's source, never measured on an Apple GPU."
_CPU_MEASURED = "cpu: measured"


def rules_of(name: str | None = None) -> Rules:
    """The rules of a backend: those of the device of this machine where it has that backend, else of a common one.

    Args:
        name: "metal", "cuda" or "cpu"; by default what this process computes on.

    Raises:
        InvalidArgumentError: Another name.
    """
    here = backend_here()
    if name is None:
        name = "cpu" if computes_on_cpu() else here
    if name == "cpu":
        return Rules("cpu", CPU_COMMAND, "any processor", 0, False, 1, 0, frozenset(), _CPU_MEASURED)
    if name == "cuda":
        capability = (9, 0)
        if here == "cuda":
            info = device_info()
            capability = (info["compute_capability_major"], info["compute_capability_minor"])
        command = _overridden(CUDA_COMMANDS.get(capability, CUDA_OTHERS), here == "cuda")
        device = f"a GPU of compute capability {capability[0]}.{capability[1]}"
        return Rules("cuda", command, device, PAGE, True, H200_PROCESSORS, 0, _FUSED, _CUDA_MEASURED)
    if name == "metal":
        architecture = str(device_info()["architecture"]) if here == "metal" else "s"
        command = _overridden(METAL_COMMANDS.get(architecture[-1:], METAL_OTHERS), here == "metal")
        device = architecture if here == "metal" else "a Max chip"
        tiles = METAL_SPLIT_TILES_LARGE if architecture[-1:] in "sd" else METAL_SPLIT_TILES
        return Rules("metal", command, device, PAGE, False, 1, tiles, _FUSED, _METAL_MEASURED)
    raise InvalidArgumentError(f'backend={name!r}: the backends are "metal", "cuda" and "cpu".')


def _overridden(rule: CommandRule, is_here: bool) -> CommandRule:
    """The rule with what the environment says instead, as mlx/utils.h reads it; of another machine's nobody knows."""
    if not is_here:
        return rule
    operations = int(os.environ.get("MLX_MAX_OPS_PER_BUFFER", rule.operations))
    elements = int(os.environ.get("MLX_MAX_MB_PER_BUFFER", rule.elements))
    return CommandRule(operations, elements, rule.distinct)


def rounded(rules: Rules, nbytes: int) -> int:
    """The bytes that an allocation takes.

    Args:
        rules: The backend.
        nbytes: The bytes asked for.

    Examples:
        >>> [rounded(rules_of("cuda"), n) for n in (0, 4, 100, 20_000)]
        [0, 8, 128, 32768]
        >>> rounded(rules_of("metal"), 100), rounded(rules_of("metal"), 20_000)
        (100, 32768)
    """
    if nbytes == 0 or not rules.rounding:
        return nbytes
    if nbytes > rules.rounding or (rules.powers and nbytes == rules.rounding):
        return -(-nbytes // rules.rounding) * rules.rounding
    return max(8, 1 << (nbytes - 1).bit_length()) if rules.powers else nbytes
