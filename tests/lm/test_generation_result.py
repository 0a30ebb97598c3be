import json

from mlx_tune.lm.generation_result import GenerationBatchResult, GenerationTrial

MB = 10**6


def result(*rates: tuple[int, float, bool]) -> GenerationBatchResult:
    """Of batch sizes, the tokens that each writes a second, and which of them fit."""
    trials = tuple(GenerationTrial(n, None, 5 * MB, 6 * MB, n / rate, fits) for n, rate, fits in rates)
    largest = max(trial.batch_size for trial in trials if trial.fits)
    return GenerationBatchResult(largest, 64, 32, None, MB, 8 * MB, "given", trials, None, 1.0)


def remarks(found: GenerationBatchResult) -> list[object]:
    return [row[-1] for row in found.table().rows]


def test_the_knee_is_the_smallest_with_nine_tenths_of_the_best_rate_among_those_that_fit() -> None:
    found = result((1, 10, True), (2, 91, True), (4, 99, True), (8, 100, True), (16, 900, False))
    assert found.knee == 2
    assert remarks(found) == ["lowest latency", "knee", "", "largest", "does not fit"]


def test_the_largest_may_be_the_knee() -> None:
    found = result((1, 10, True), (2, 20, True))
    assert found.knee == 2
    assert remarks(found) == ["lowest latency", "largest, knee"]


def test_rates_are_of_all_rows_and_go_into_the_json() -> None:
    answer = json.loads(json.dumps(result((1, 10, True), (4, 40, True)).to_dict()))
    assert [trial["tokens_per_second"] for trial in answer["trials"]] == [10, 40]
    assert (answer["batch_size"], answer["knee"]) == (4, 4)
