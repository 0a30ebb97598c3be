"""The precision of float32 products where the tests run."""

from mlx_tune.measuring.float32_products import rounds_factors


def rounding(exact: float) -> float:
    """A tolerance for sums of float32 products: `exact`, or what factors of ten bits explain where MLX rounds so."""
    return max(exact, 2**-9) if rounds_factors() else exact
