from dataclasses import fields, replace
from inspect import signature

import mlx_tune as mt
from mlx_tune.quantization.planning.request import Request


def test_both_functions_begin_with_its_fields_in_order() -> None:
    names = [field.name for field in fields(Request)]
    for function in (mt.quantize_model, mt.plan_quantization):
        assert list(signature(function).parameters)[1 : 1 + len(names)] == names


def test_either_size_is_a_target() -> None:
    plain = Request(4, 64, "nearest", "affine", "fast", None, None, None, None, False, False, None)
    assert not plain.targeted
    assert replace(plain, target_bpw=4.5).targeted
    assert replace(plain, target_bytes="4GB").targeted
