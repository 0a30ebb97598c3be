import pytest
from quantization_toys import few_runs
from toy_models import data_folder, model_folder, tokenizer_folder

__all__ = ["data_folder", "few_runs", "model_folder", "tokenizer_folder"]


@pytest.fixture(scope="module", autouse=True)
def quick(quick_garbage: None) -> None:
    """Every command that searches collects garbage."""
