"""One world for all tests: it is cheap to make, and its caches make the tests quick."""

import pytest
from minirlhf_course.world import GoldLabeler, SimulatedLabeler, World, make_labelers
from minirlhf_course.world.corpus import CorpusWriter


@pytest.fixture(scope="session")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="session")
def web(world: World) -> CorpusWriter:
    return CorpusWriter(world)


@pytest.fixture(scope="session")
def gold(world: World) -> GoldLabeler:
    return GoldLabeler(world)


@pytest.fixture(scope="session")
def labelers(world: World) -> list[SimulatedLabeler]:
    return make_labelers(world)
