"""The table of Metal's fused kernels against the names of those that MLX ships.

On a Mac they are in the installed library. Elsewhere `MLX_METAL_WHEEL` names a wheel of `mlx-metal`, from
`pip download --no-deps --platform macosx_15_0_arm64 --only-binary=:all: mlx-metal`.
"""

import os
import re
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_tune.graphs.backends import METAL_ATTENTION_VJP_WIDTHS, METAL_ATTENTION_WIDTHS, rules_of

LIBRARY = "mlx/lib/mlx.metallib"
WHEEL = os.environ.get("MLX_METAL_WHEEL")
INSTALLED = Path(mx.__file__).parent / "lib" / "mlx.metallib"

pytestmark = pytest.mark.skipif(
    not WHEEL and not INSTALLED.exists(), reason="needs a Mac, or the path of a wheel of mlx-metal in MLX_METAL_WHEEL"
)


@pytest.fixture(scope="module")
def kernels() -> set[str]:
    content = zipfile.ZipFile(WHEEL).read(LIBRARY) if WHEEL else INSTALLED.read_bytes()
    return {name.decode() for name in re.findall(rb"[A-Za-z0-9_]{6,140}", content)}


@pytest.mark.parametrize("width", sorted(METAL_ATTENTION_WIDTHS))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_of_each_width_has_a_kernel(kernels, width, dtype):
    assert any(re.match(rf"steel_attention_{dtype}_bq\d+_bk\d+_bd{width}_bv{width}_", name) for name in kernels)


@pytest.mark.parametrize("dtype", ["float", "float16_t", "bfloat16_t"])
def test_the_widths_of_attentions_backward_kernels_are_those_of_the_table(kernels, dtype):
    found = {int(m[1]) for name in kernels if (m := re.search(rf"sdpa_vjp_odo_{dtype}_(\d+)(?!\d)", name))}
    assert found == METAL_ATTENTION_VJP_WIDTHS


def test_every_function_that_is_taken_for_fused_has_its_kernels(kernels):
    names = {
        "rms_norm": ("rms", "vjp_rms"),
        "layer_norm": ("layer_norm", "vjp_layer_norm"),
        "rope": ("rope_",),
        "cross_entropy": ("cross_entropy_", "cross_entropy_vjp_"),
        "scaled_dot_product_attention": ("steel_attention_", "sdpa_vector_", "sdpa_vjp_"),
    }
    assert rules_of("metal").fused == names.keys()
    for function, beginnings in names.items():
        for beginning in beginnings:
            for dtype in ("bfloat16", "float16", "float"):
                assert any(name.startswith(beginning) and dtype in name for name in kernels), (function, beginning)
