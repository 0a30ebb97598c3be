from mlx_tune.checkpointing.verify_report import GradientDifference, VerifyReport


def test_long_tables_are_cut():
    entries = tuple(GradientDifference(f"w{i}", 1.0, 0.0, 0.0, 1e-6, False) for i in range(25))
    assert "and 5 more, none worse" in str(VerifyReport(("a", "b"), 2.0, 0.0, 1e-6, entries))


def test_a_loss_that_alone_differs_is_different():
    report = VerifyReport(("a",), 2.0, 1.0, 1e-6, (GradientDifference("w", 1.0, 0.0, 0.0, 1e-6, False),))
    assert report.verdict == "different"
    assert "The loss is wrong, and no gradient is" in str(report)
