"""The memory that this machine may wire, and that a request asks for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_tune import devices
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.trees import arrays_of, walk
from mlx_tune.units import format_bytes, parse_bytes
from mlx_tune.wiring.registry import WiredRequest

#: What the system keeps for itself: this, or a quarter of RAM where that is more, but never above half of RAM.
RESERVE_BYTES = 8_000_000_000
#: A model above this share of the cap leaves no room for what computing with it makes.
CLOSE = 0.9
#: The first macOS with residency sets. Before, MLX stores the limit and wires nothing (metal/resident.cpp).
FIRST_MACOS = 15


@dataclass(frozen=True)
class Capacity:
    """The memory that this machine may wire.

    Attributes:
        cap_bytes: The most: the recommended working set, or RAM less the reserve where that is smaller. 0 where
            nothing can be wired.
        recommended_bytes: Metal's recommended working set, which `mx.set_wired_limit` refuses to exceed.
        memory_bytes: RAM; 0 where the device does not say.
        reason: Why nothing can be wired; empty where it can.
    """

    cap_bytes: int = 0
    recommended_bytes: int = 0
    memory_bytes: int = 0
    reason: str = ""


def reserve_bytes(memory_bytes: int) -> int:
    """The part of this much RAM that stays with the system: 8 GB or a quarter, whichever is more, at most half.

    Examples:
        >>> reserve_bytes(16_000_000_000), reserve_bytes(64_000_000_000)
        (8000000000, 16000000000)
    """
    return min(max(RESERVE_BYTES, memory_bytes // 4), memory_bytes // 2)


def read_capacity() -> Capacity:
    """Ask the backend whether it can wire, and how much.

    Decided by `mx.metal.is_available()` and `mx.device_info()` alone; the version of macOS narrows it only where
    there is one.
    """
    try:
        info = devices.metal_info()
    except RuntimeError as error:
        return Capacity(reason=f"Metal gives this session no device: {error}")
    if info is None:
        return Capacity(reason=f"the {devices.backend()} backend of MLX has nothing to wire: it is a Metal feature")
    macos = devices.macos_version()
    if macos is not None and macos[0] < FIRST_MACOS:
        version = ".".join(map(str, macos))
        return Capacity(reason=f"macOS {version} stores the limit and wires nothing: it takes macOS {FIRST_MACOS}")
    recommended = int(info.get("max_recommended_working_set_size", 0))
    if recommended <= 0:
        return Capacity(reason="the device reports no recommended working set, so no limit would be accepted")
    memory = int(info.get("memory_size", 0))
    cap = min(recommended, memory - reserve_bytes(memory)) if memory > 0 else recommended
    return Capacity(cap, recommended, memory)


def read_request(wanted: Any, headroom: float, cap_bytes: int) -> WiredRequest:
    """Turn what `wired_limit` was given into a request.

    Args:
        wanted: A model, an optimizer or any tree of them and of arrays; bytes; text such as "24GB"; None for all that
            may be wired.
        headroom: The share to add to the bytes of arrays.
        cap_bytes: The bytes that None stands for.

    Returns:
        The request; tied parameters are in it once.

    Raises:
        InvalidArgumentError: Not a size.
    """
    if wanted is None:
        return WiredRequest(extra_bytes=cap_bytes)
    if _is_size(wanted):
        return WiredRequest(extra_bytes=parse_bytes(wanted))
    arrays = list(_arrays(wanted))
    # A weak reference tells arrays apart without keeping them alive: a training step replaces them while they are
    # wired. Python hands out one per object, so its address is a key as long as the request holds it; the array's own
    # address might belong to another array by then.
    references = tuple(weakref.ref(array) for array in arrays)
    sizes = {id(reference): array.nbytes for reference, array in zip(references, arrays, strict=True)}
    return WiredRequest(arrays=sizes, headroom=headroom, keys=references)


def check_wanted(wanted: Any) -> None:
    """Raise `InvalidArgumentError` now for what `read_request` would refuse later."""
    if wanted is None:
        return
    if _is_size(wanted):
        parse_bytes(wanted)
    elif next(_arrays(wanted), None) is None:
        raise InvalidArgumentError(
            f"There is no array in this {type(wanted).__name__}: give wired_limit a model, an optimizer, arrays, "
            'bytes, text such as "24GB", or None for all that may be wired.'
        )


def _is_size(wanted: object) -> bool:
    import mlx.core as mx

    return isinstance(wanted, str | float) or (hasattr(wanted, "__index__") and not isinstance(wanted, mx.array))


def _arrays(tree: object) -> Iterator[Any]:
    """Every array of a model, an optimizer or a tree of them and of arrays, as often as it occurs."""
    import mlx.core as mx

    for node in walk(tree):
        if isinstance(node, mx.array):
            yield node
        elif not isinstance(node, dict) and callable(parameters := getattr(node, "parameters", None)):
            yield from arrays_of(parameters())  # a model that is no module of MLX's


def closeness_warning(model_bytes: int, capacity: Capacity) -> str | None:
    """The warning for a model that hardly fits, with the `sysctl` line that would help where one would.

    Args:
        model_bytes: The model's arrays, without headroom.
        capacity: The capacity from `read_capacity`.

    Returns:
        The text, or None for a model that leaves a tenth of the cap free.
    """
    if model_bytes <= CLOSE * capacity.cap_bytes:
        return None
    text = (
        f"The model holds {format_bytes(model_bytes)}, close to the {format_bytes(capacity.cap_bytes)} that may be "
        "wired on this machine: what does not fit is not kept resident, and generation can be slow. "
    )
    if not capacity.memory_bytes:
        return text + "Quantize it to fewer bits."
    most = capacity.memory_bytes - reserve_bytes(capacity.memory_bytes)
    line = f"sudo sysctl iogpu.wired_limit_mb={most // 2**20}"
    reserve = format_bytes(reserve_bytes(capacity.memory_bytes))
    if most // 2**20 > capacity.recommended_bytes // 2**20:
        return text + (
            f"Raise the system's limit with `{line}`, which leaves the system {reserve}, and start Python again "
            "(MLX reads the limit once); or quantize the model to fewer bits."
        )
    return text + (
        f"The system's limit is already as high as leaves the system {reserve} (`{line}` would not raise it): "
        "quantize the model to fewer bits."
    )
