"""The process in which a section is measured: `python -m mlx_tune.bench.section_process NAME SIZE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mlx_tune.diagnosis.child_answers import say


def main(argv: Sequence[str]) -> int:
    """Measure the section of that name and answer with its figures, its peak and its seconds."""
    from mlx_tune import devices
    from mlx_tune.bench.sections import choose
    from mlx_tune.bench.sizes import LeftOutError, room_bytes, sizes_named
    from mlx_tune.memory import track_memory

    name, size = argv
    (section,) = choose([name])
    sizes = sizes_named(size, devices.backend())
    figures, left_out = None, ""
    with track_memory() as memory:
        try:
            figures = section.measure(sizes, room_bytes(sizes))
        except LeftOutError as reason:
            left_out = str(reason)
    say({"figures": figures, "left_out": left_out, "peak_bytes": memory.peak_bytes, "seconds": memory.seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
