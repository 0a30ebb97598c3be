import pytest
from planned_training import Training


@pytest.fixture(scope="module")
def floors():
    training = Training()
    return training.floor([False] * 5), training.floor([True] * 5)
