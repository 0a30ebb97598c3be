import json


def test_the_choice_is_all_that_standard_output_holds_as_json(tool):
    code, out, _ = tool("fit", "--memory-budget", "50MB", "--max-seq-length", "32", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["batch_size"] >= 1
    assert answer["peak_bytes"] <= answer["budget_bytes"] == 50_000_000


def test_it_ends_with_the_command_that_trains_so(tool):
    code, out, _ = tool("fit", "--memory-budget", "50MB", "--max-seq-length", "32", "--target-batch", "2")
    assert code == 0
    assert "mlx-tune lora" in out
    assert "--target-batch 2" in " ".join(out.replace("\\\n", " ").split())


def test_a_budget_below_the_model_is_bad_news_and_not_an_error(tool):
    code, out, err = tool("fit", "--memory-budget", "10kB")
    assert code == 1
    assert "Traceback" not in out + err
