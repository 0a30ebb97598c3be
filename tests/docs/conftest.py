from toy_models import data_folder, model_folder, tokenizer_folder

__all__ = ["data_folder", "model_folder", "tokenizer_folder"]
