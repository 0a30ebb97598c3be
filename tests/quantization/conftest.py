import pytest
from quantization_toys import few_runs

__all__ = ["few_runs"]


@pytest.fixture(scope="module", autouse=True)
def quick(quick_garbage: None) -> None:
    """Models leave cycles behind, and each is collected before the next test."""
