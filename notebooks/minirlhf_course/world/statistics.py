"""Measure the world: `python -m minirlhf_course.world.statistics` prints the figures of the data card.

They say whether the world is worth training on: room above the demonstrations, labelers who disagree as people do, few
ties, and no cheap feature (such as length) that predicts the better answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random

from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.families import Task
from minirlhf_course.world.gold import GoldLabeler
from minirlhf_course.world.labelers import SimulatedLabeler, make_labelers
from minirlhf_course.world.world import World
from minirlhf_course.world.write import comparisons
from minirlhf_course.world.writer import Writer


def tasks(world: World, n: int, rng: Random) -> Iterator[Task]:
    """`n` training tasks."""
    for _ in range(n):
        yield world.task(rng)


def headroom(world: World, gold: GoldLabeler, n: int = 1000, seed: int = 1) -> dict[str, float]:
    """How good demonstrations are between babble and the best answer.

    Returns:
        `base`, `demonstrations`, `best`: mean gold; `room`: (best - demonstrations) / (best - base); `improvable`: the
        share of demonstrations more than 0.3 below the best; `best_wins`: share of prompts where the best answer beats
        a demonstration (ties count half); `ties`: share of prompts where two independent demonstrations score the same.
    """
    web, rng = CorpusWriter(world), Random(f"headroom {seed}")
    base, first, best, wins, ties, improvable = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for task in tasks(world, n, rng):
        top = gold.best(task.prompt)
        score, other = (gold.score(task.prompt, world.demonstrate(task, Writer(rng))).total for _ in range(2))
        base += gold.score(task.prompt, web.babble(rng)).total / n
        first += score / n
        best += top / n
        wins += ((top > score + 1e-6) + 0.5 * (abs(top - score) <= 1e-6)) / n
        ties += (abs(score - other) <= 1e-6) / n
        improvable += (top > score + 0.3) / n
    room = (best - first) / (best - base)
    return {
        "base": base,
        "demonstrations": first,
        "best": best,
        "room": room,
        "improvable": improvable,
        "best_wins": wins,
        "ties": ties,
    }


def by_family(world: World, gold: GoldLabeler, n: int = 150, seed: int = 2) -> dict[str, tuple[float, float, float]]:
    """Family -> (mean gold of demonstrations, of the best answer, share of ties between two demonstrations)."""
    table = {}
    for name in world.families:
        rng = Random(f"by family {seed} {name}")
        scores, tops, ties = 0.0, 0.0, 0.0
        for _ in range(n):
            task = world.task(rng, family=name)
            a, b = (gold.score(task.prompt, world.demonstrate(task, Writer(rng))).total for _ in range(2))
            scores += (a + b) / 2 / n
            tops += gold.best(task.prompt) / n
            ties += (abs(a - b) <= 1e-6) / n
        table[name] = (scores, tops, ties)
    return table


def agreement(
    world: World, left: Sequence[SimulatedLabeler], right: Sequence[SimulatedLabeler], n: int = 800, seed: int = 3
) -> float:
    """Share of pairs of answers on which two different labelers, drawn from the two groups, agree (ties dropped)."""
    rng = Random(f"agreement {seed}")
    same = count = 0
    for row in comparisons(world, n, seed, left):
        one = rng.choice(left)
        two = rng.choice([labeler for labeler in right if labeler.name != one.name])
        scores = [[labeler.score(row["prompt"], text, rng) for text in row["responses"]] for labeler in (one, two)]
        for i, j in combinations(range(len(scores[0])), 2):
            a, b = scores[0][i] - scores[0][j], scores[1][i] - scores[1][j]
            if a and b:
                count += 1
                same += (a > 0) == (b > 0)
    return same / count


def accuracy(world: World, gold: GoldLabeler, labelers: Sequence[SimulatedLabeler], n: int = 600) -> dict[str, float]:
    """How often gold, and how often sheer length, orders a labeler's pairs as the labeler does (their ties dropped).

    Returns:
        `gold` (the ceiling of a reward model that learns the truth), `length`, and `ties` (share of tied pairs).
    """
    right = {"gold": 0.0, "length": 0.0}
    count = {"gold": 0, "length": 0}
    pairs = tied = 0
    for row in comparisons(world, n, 4, labelers):
        guesses = {
            "gold": [gold.score(row["prompt"], text).total for text in row["responses"]],
            "length": [float(len(text.split(" "))) for text in row["responses"]],
        }
        for i, j in combinations(range(len(row["scores"])), 2):
            truth = row["scores"][i] - row["scores"][j]
            pairs += 1
            tied += truth == 0
            for name, guess in guesses.items():
                if truth and guess[i] != guess[j]:
                    count[name] += 1
                    right[name] += (guess[i] > guess[j]) == (truth > 0)
    return {**{name: right[name] / count[name] for name in right}, "ties": tied / pairs}


def seconds_per_score(world: World, n: int = 300) -> float:
    """Mean processor time of one gold score, over fresh prompts and answers."""
    web, rng = CorpusWriter(world), Random("speed")
    pairs = [
        (task.prompt, web.babble(rng) if i % 2 else world.demonstrate(task, Writer(rng)))
        for i, task in enumerate(tasks(world, n, rng))
    ]
    gold = GoldLabeler(World(world.seed))
    start = time.process_time()  # a busy machine makes nothing slower
    for prompt, answer in pairs:
        gold.score(prompt, answer)
    return (time.process_time() - start) / n


def main() -> None:
    """Print the table."""
    world = World(0)
    gold = GoldLabeler(world)
    train, heldout = make_labelers(world), make_labelers(world, heldout=True)
    print(f"vocabulary                          {len(world.vocabulary)} words")
    for name, value in headroom(world, gold).items():
        print(f"{name:35s} {value:.3f}")
    for name, (demo, best, ties) in by_family(world, gold).items():
        print(f"  {name:12s} demonstrations {demo:5.2f}   best {best:4.2f}   ties {ties:.2f}")
    print(f"agreement, training labelers        {agreement(world, train, train):.3f}")
    print(f"agreement, training with held-out   {agreement(world, train, heldout):.3f}")
    print(f"agreement, held-out labelers        {agreement(world, heldout, heldout):.3f}")
    for name, value in accuracy(world, gold, train).items():
        print(f"labelers' pairs: {name:18s} {value:.3f}")
    lengths = [len(answer.split(" ")) for _, answer in world.demonstrations(500, 5)]
    print(f"words in a demonstration            {sum(lengths) / len(lengths):.1f} (at most {max(lengths)})")
    words = Counter(len(text.split(" ")) for text in CorpusWriter(world).documents(500, 5))
    print(f"words in a document                 {sum(k * n for k, n in words.items()) / 500:.1f}")
    print(f"milliseconds for one gold score     {1000 * seconds_per_score(world):.3f}")


if __name__ == "__main__":
    main()
