from toy_models import data_folder, model_folder, rows, tokenizer_folder, toy

__all__ = ["data_folder", "model_folder", "rows", "tokenizer_folder", "toy"]
