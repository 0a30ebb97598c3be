import mlx.core as mx

from mlx_tune.bench import products
from mlx_tune.bench.sizes import TOY


def test_each_format_is_compared_at_each_number_of_rows():
    found = products.products(TOY, TOY.most_bytes)
    assert set(found["formats"]) == {"4 bits, group 64", "8 bits, group 64", "mxfp4"}
    for one in found["formats"].values():
        assert set(one["speed"]) == {str(rows) for rows in TOY.product_rows}
        assert all(speed["ratio"] > 0 and speed["missing"] is None for speed in one["speed"].values())
    four = found["formats"]["4 bits, group 64"]
    assert four["share_of_bfloat16"] == (4 / 8 + 2 * 2 / 64) / 2
    assert four["bytes"] == four["share_of_bfloat16"] * 2 * TOY.product_width**2


def test_a_kernel_that_there_is_none_of_is_told_in_words_of_mlx(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("[qmm] No implementation\nfor this")

    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    found = products.products(TOY, TOY.most_bytes)["formats"]["mxfp4"]["speed"]["1"]
    assert found == {"ratio": None, "uncertainty": None, "missing": "[qmm] No implementation"}
