import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.allocator import DONATION_SLACK, Allocator


def allocator(*sizes: int, references: int = 1, role: str = "made") -> Allocator:
    """One value of so many float32 numbers for each size."""
    values = [Value((n,), mx.float32, role) for n in sizes]
    return Allocator(Graph(values), [0], references=[references] * len(values))


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=12))
def test_live_bytes_are_those_of_the_buffers_that_somebody_holds(steps: list[tuple[int, bool]]) -> None:
    m = allocator(*(size for size, _ in steps))
    alive: dict[int, int] = {}
    highest, at_the_peak = 0, {}
    for value, (size, freed) in enumerate(steps):
        m.allocate(value)
        alive[value] = 4 * size
        if value == 0 or sum(alive.values()) > highest:
            highest, at_the_peak = sum(alive.values()), dict(alive)
        if freed:
            first = next(iter(alive))
            m.release(m.buffer[first])
            del alive[first]
        assert m.live == sum(alive.values()) == sum(m.now)
    assert m.peak == highest
    assert {buffer.value: buffer.nbytes for buffer in m.owners()} == at_the_peak


def test_a_shared_buffer_goes_with_its_last_holder() -> None:
    m = allocator(8, 8)
    m.allocate(0)
    m.share(1, 0)
    m.release(m.buffer[0])
    assert m.live == 32
    m.release(m.buffer[1])
    assert m.live == 0


def test_a_buffer_is_given_on_only_where_nothing_else_needs_it_and_it_fits() -> None:
    numbers = DONATION_SLACK // 4
    m = allocator(numbers + 8, 8, 4)
    for value in range(3):
        m.allocate(value)
    assert m.donatable(0, 1)  # as much larger as MLX allows
    assert not m.donatable(0, 2)
    m.references[0] = 2
    assert not m.donatable(0, 1)
    m.references[0] = 1
    m.share(1, 0)
    assert not m.donatable(0)


def test_a_copy_lies_in_the_place_of_what_nothing_else_needs() -> None:
    m = allocator(8, 8, 8)
    m.allocate(0)
    m.copied(0, 1, whole=True)
    assert m.buffer[1] == m.buffer[0]
    m.references[1] = 2
    m.copied(1, 2, whole=True)
    assert m.live == 64


def test_every_buffer_has_a_purpose() -> None:
    values = [Value((1,), mx.float32, role) for role in ("parameter", "optimizer", "batch", "captured", "made", "made")]
    m = Allocator(Graph(values, [Node("Op", (), (5,))]), [0], references=[1] * 6, updates=frozenset({5}))
    for value in range(6):
        m.allocate(value)
    m.temporary(12, 5)
    assert [buffer.purpose for buffer in m.buffers] == [
        "parameters", "optimizer", "batch", "other state", "activations", "updates", "temporaries"
    ]  # fmt: skip
    assert m.now == [4, 4, 4, 4, 4, 4, 12]
