import pytest
from metal_stand_in import metal
from mlx_lm.tuner import trainer
from toy_models import data_folder, model_folder, rows, tokenizer_folder, toy

__all__ = ["data_folder", "metal", "model_folder", "rows", "tokenizer_folder", "toy"]


@pytest.fixture
def arguments(tmp_path):
    def make(**changes) -> trainer.TrainingArgs:
        settings = {
            "batch_size": 4,
            "iters": 4,
            "steps_per_report": 2,
            "steps_per_eval": 2,
            "steps_per_save": 2,
            "val_batches": 1,
            "max_seq_length": 64,
            "adapter_file": tmp_path / "adapters" / "adapters.safetensors",
        }
        return trainer.TrainingArgs(**settings | changes)

    return make


@pytest.fixture
def adapters_exist(arguments):
    arguments().adapter_file.parent.mkdir()
