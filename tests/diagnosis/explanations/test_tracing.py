import pytest
from reported_errors import causes_of, reported

REPORTED = (
    reported("libstdc++", "IndexError: _Map_base::at", "A compiled function that lost an array"),
    reported("mlx#2864", "IndexError: unordered_map::at: key not found", "A compiled function that lost an array"),
    reported(
        "mlx#810",
        "RuntimeError: [eval] Graph depth exceeded maximum allowed limit. Try evaluating the graph more frequently.",
        "A graph that is never evaluated",
    ),
    reported(
        "mlx#1880",
        "[compile] Too many inputs/outputs fused in the Metal Compiled primitive which exhausted the "
        "available argument buffers for the kernel.",
        "A compiled kernel with too many arrays",
    ),
    reported("mlx#4110", "terminate called without an active exception", "An abort after a thread has ended"),
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
