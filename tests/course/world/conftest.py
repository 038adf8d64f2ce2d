"""One world for all tests: it is cheap to make, and its caches make the tests quick."""

import pytest
from minirlhf_course.world import GoldLabeler, World


@pytest.fixture(scope="session")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="session")
def gold(world: World) -> GoldLabeler:
    return GoldLabeler(world)
