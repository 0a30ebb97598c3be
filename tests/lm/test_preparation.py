import pytest
from mlx_lm.lora import CONFIG_DEFAULTS

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.preparation import StandInRows, read_settings


def test_what_was_given_goes_before_the_file_and_that_before_mlx_lms_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 3\niters: 7\nlearning_rate: 1e-4\n")
    settings = read_settings({"batch_size": 2, "iters": None}, file)
    assert (settings["batch_size"], settings["iters"], settings["learning_rate"]) == (2, 7, 1e-4)
    rest = set(CONFIG_DEFAULTS) - {"batch_size", "iters", "learning_rate", "num_layers"}
    assert {name: settings[name] for name in rest} == {name: CONFIG_DEFAULTS[name] for name in rest}


def test_layers_are_none_where_nobody_said():
    assert read_settings({})["num_layers"] is None
    assert read_settings({"num_layers": 4})["num_layers"] == 4


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"run\.yaml"):
        read_settings({}, tmp_path / "run.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"gone\.yaml"):
        read_settings({}, tmp_path / "gone.yaml")


def test_rows_that_stand_in_are_of_one_length_and_within_the_vocabulary():
    rows = StandInRows(5, 12, 100)
    assert len(rows) == 5
    for i in range(len(rows)):
        tokens, offset = rows[i]
        assert len(tokens) == 12
        assert all(0 <= int(token) < 100 for token in tokens)
        assert offset == 0
