from mlx_tune.diagnosis import check


def test_every_check_says_what_it_is_for_and_what_can_be_done():
    everything = check.all_checks()
    assert len({one.name for one in everything}) == len(everything)
    for one in everything:
        assert one.title.endswith("."), one.name
        assert one.bench or one.explanation or one.remedies, one.name
