"""A small world whose truth is known: texts to learn from, and a gold labeler that scores any answer from its meaning.

Example:
    >>> from minirlhf_course.world import GoldLabeler, World
    >>> world = World(seed=0)
    >>> gold = GoldLabeler(world)
    >>> gold.score("where does a frog live ?", "a frog lives in a pond .").total
    2.0
"""

from minirlhf_course.world.gold import GoldLabeler, GoldScore
from minirlhf_course.world.labelers import SimulatedLabeler, make_labelers
from minirlhf_course.world.world import World
from minirlhf_course.world.write import write_world

__all__ = ["GoldLabeler", "GoldScore", "SimulatedLabeler", "World", "make_labelers", "write_world"]
