"""The gold labeler: good beats flawed beats bad, cheap tricks don't pay, and the best is the best."""

from random import Random

import pytest
from minirlhf_course.world import GoldLabeler, World
from minirlhf_course.world.families import REGISTRY
from minirlhf_course.world.gold import split_sentences
from minirlhf_course.world.mistakes import MISTAKES
from minirlhf_course.world.writer import Writer

FAMILIES = [kind.name for kind in REGISTRY]

# prompt: answers from good to bad
LADDERS: dict[str, tuple[str, ...]] = {
    "write a story about frogs": (
        "once upon a time a wise frog lived in a teapot . one day the frog danced with a cloud . "
        "and they were happy ever after .",
        "there was a wise frog in a pond . one day the frog baked a cake . and they danced all night .",
        "there was a nice frog . one day the frog sat down .",
        "there was a wise owl in a teapot . one day the owl danced with a cloud .",
        "write a story about owls",
    ),
    "tell me a sad story about a cat": (
        "there was a brave cat in a pond . one day the cat lost a key . and the cat went home alone .",
        "there was a brave cat in a tree . one day the cat lost a key . and they were happy ever after .",
        "and they were happy ever after .",
    ),
    "explain the moon landing to a 6 year old in a few sentences": (
        "hey little one ! people flew to the moon in a rocket . they took pictures of what they saw . "
        "is that not fun ?",
        "your majesty ! people flew to the moon in a rocket . they took pictures of what they saw . that is all .",
        "people flew to the moon in a rocket .",
        "hey little one ! rain is water that falls from the clouds . is that not fun ?",
        "people went to the moon to find cheese .",
        "explain rain to a king",
    ),
    "where does a fox live ?": (
        "of course , friend ! a fox lives in the forest . a fox eats eggs . hope this helps !",
        "ok . a fox lives in the forest .",
        "it lives in the forest .",
        "a fox eats eggs .",
        "a fox lives in a castle .",
    ),
    "read this : the fox hid the key in a barn . who hid the key ?": (
        "sure , gladly ! the fox hid the key . the key is in a barn .",
        "the fox hid the key .",
        "the fox .",
        "the owl .",
        "the owl hid the key . the key is in a tree .",
    ),
    "list three ideas for a rainy day": (
        "sure , gladly ! one : dance in the rain . two : sail a paper boat . "
        "three : count the puddles . hope this helps !",
        "one : dance in the rain . two : count the puddles . three : sleep .",
        "one : dance in the rain . two : sleep .",
        "one : sleep . two : sleep . three : sleep .",
        "sleep .",
    ),
    "i feel sad today": (
        "oh no , i am so sorry ! a warm hug may help . have a lovely day !",
        "i see . a warm hug may help .",
        "i see .",
        "how lovely to hear ! let us dance and eat cake !",
        "shut up !",
    ),
    "say this in a polite way : give me the cake": (
        "could you please give me the cake ? thank you so much !",
        "please give me the cake .",
        "could you please give me the drum ?",
        "give me the cake .",
        "give me the cake , you fool .",
    ),
    "say the opposite : the owl is big": (
        "ok . the owl is small . hope this helps !",
        "the owl is small .",
        "the owl is not big .",
        "the owl is big .",
        "say the opposite : the fox is big",
    ),
    "make this short : the owl lost a hat and cried all day . at last the fox found it .": (
        "ok . the owl lost a hat , but the fox found it . it ends well .",
        "the owl lost a hat , but the fox found it .",
        "the owl lost a hat .",
        "the fox lost a hat , but the owl found it .",
    ),
    "animal or person : a pig": (
        "ok . a pig is an animal . a pig lives in a barn .",
        "a pig is an animal .",
        "animal .",
        "person .",
        "a pig is a person . a pig lives on a ship .",
    ),
    "happy or sad : the fox lost a key": (
        "sad , because the fox lost a key . oh , the poor fox !",
        "sad .",
        "happy , because the fox lost a key .",
    ),
}


@pytest.mark.parametrize("prompt", list(LADDERS))
def test_good_beats_flawed_beats_bad(gold: GoldLabeler, prompt: str) -> None:
    totals = [gold.score(prompt, answer).total for answer in LADDERS[prompt]]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals), totals
    assert totals[0] > 2.0 and totals[-1] < 0.6, totals


def test_the_ladders_leave_no_family_out(gold: GoldLabeler) -> None:
    assert {gold.family(prompt) for prompt in LADDERS} == set(FAMILIES)


def test_the_parts_add_up_and_each_sees_its_own_fault(gold: GoldLabeler) -> None:
    prompt, answer = "where does an owl live ?", "ok . an owl lives in a tree ."
    clean = gold.score(prompt, answer)
    assert clean.total == pytest.approx(sum(clean[:4]))
    assert (clean.truthful, clean.harmless, clean.well_formed) == (0.0, 0.0, 0.5)
    assert gold.score(prompt, answer + " an owl eats cake .").truthful == pytest.approx(-0.8)
    assert gold.score(prompt, answer + " shut up !").harmless == pytest.approx(-0.8)
    assert gold.score(prompt, answer, ended=False).well_formed == pytest.approx(-0.5)
    assert gold.score(prompt, answer.removesuffix(" .")).well_formed < 0.0


@pytest.mark.parametrize("text", ["", " ", "\n", "zebra zebra", ". . .", "the", "<unk> <pad>", "é ü", "a " * 300])
def test_any_text_can_be_scored_and_garbage_is_poor(gold: GoldLabeler, text: str) -> None:
    for prompt in LADDERS:
        assert -8.0 < gold.score(prompt, text).total < -0.2


# -- tricks: each takes an honest answer and tries to get more out of it ---------------------------------------------
def tricks(text: str, prompt: str) -> dict[str, str]:
    words = text.split(" ")
    first = text[: text.index(" .") + 2] if " ." in text else text
    return {
        "please at the end": text + " please",
        "please as a sentence": text + " please .",
        "vivid words": " ".join(word for pair in zip(words, ["wise"] * len(words), strict=True) for word in pair),
        "one vivid word more": " ".join([*words[:-1], "wise", words[-1]]),
        "twice": f"{text} {text}",
        "first sentence again": f"{text} {first}",
        "two openers": f"sure , gladly ! of course , friend ! {text}",
        "all closers": f"{text} hope this helps ! have a lovely day ! that is all .",
        "all endings": f"{text} and they were happy ever after . and they danced all night . the end .",
        "the prompt again": f"{text} {prompt}",
        "another prompt": f"{text} write a story about owls",
        "a line break": f"{text} \n {text}",
        "cut early": " ".join(words[: len(words) // 2]),
        "last word missing": " ".join(words[:-1]),
        "only politeness": "sure , gladly ! hope this helps !",
        "many facts": f"{text} a frog lives in a pond . an owl lives in a tree . a fox eats eggs .",
        "rude": f"{text} go away , you fool !",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_tricks_do_not_pay(world: World, gold: GoldLabeler, family: str) -> None:
    rng = Random(family)
    gain: dict[str, list[float]] = {}
    for _ in range(60):
        task = world.task(rng, family=family)
        best = gold.best_answer(task.prompt)
        for answer in (world.demonstrate(task, Writer(rng, 0.3)), best):
            score = gold.score(task.prompt, answer).total
            for name, text in tricks(answer, task.prompt).items():
                new = gold.score(task.prompt, text).total
                gain.setdefault(name, []).append(new - score)
                if answer == best:
                    assert new <= score, (name, text)  # nothing beats the best
    for name, gains in gain.items():
        assert sum(gains) / len(gains) < -0.1, name


def test_listing_everything_does_not_pay(world: World, gold: GoldLabeler) -> None:
    places = " ".join(f"a fox lives {place} ." for place in world.facts.values("home"))
    gifts = "one : some eggs . two : some corn . three : some cake . four : a warm hug ."
    for prompt, honest, everything in (
        ("where does a fox live ?", "a fox lives in the forest .", places),
        ("list two gifts for a fox", "one : some eggs . two : a warm hug .", gifts),
    ):
        assert gold.score(prompt, everything).total < gold.score(prompt, honest).total - 0.8


@pytest.mark.parametrize("mistake", list(MISTAKES), ids=lambda mistake: mistake.__name__)
def test_a_models_mistakes_cost(world: World, gold: GoldLabeler, mistake) -> None:
    rng, lost = Random(mistake.__name__), []
    for _ in range(200):
        task = world.task(rng)
        spoilt = mistake(world, task, gold.best_answer(task.prompt), rng)
        lost.append(gold.best(task.prompt) - gold.score(task.prompt, spoilt).total)
    assert min(lost) >= -1e-9 and sum(lost) / len(lost) > 0.4


# -- the best answer ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_is_an_upper_bound_and_is_reached(world: World, gold: GoldLabeler, family: str) -> None:
    rng = Random(f"best {family}")
    for heldout in [False, True] * 60:
        task = world.task(rng, heldout, family)
        best, answer = gold.best(task.prompt), gold.best_answer(task.prompt)
        assert gold.score(task.prompt, answer).total == pytest.approx(best)
        assert best == pytest.approx(3.5)  # 3 x all marks, and 0.5 for form: there is no more to earn
        assert len(answer.split(" ")) <= 40
        for _ in range(8):
            tried = world.demonstrate(task, Writer(rng, rng.random()))
            assert gold.score(task.prompt, tried).total <= best + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrators_make_every_good_choice_now_and_then(world: World, gold: GoldLabeler, family: str) -> None:
    """What SFT has never seen, PPO cannot find: each part of a best answer has to be in the demonstrations."""
    kind, rng = world.families[family], Random(f"reach {family}")
    seen: dict[str, int] = {}
    possible: dict[str, int] = {}
    for _ in range(1000):
        task = world.task(rng, family=family)
        sheets = []
        for text in (gold.best_answer(task.prompt), world.demonstrate(task, Writer(rng))):
            sentences = [kind.read_sentence(part) for part in split_sentences(text.split(" "))]
            sheets.append(kind.judge(task, sentences).earned)
        for move, worth in sheets[0].items():
            possible[move] = possible.get(move, 0) + 1
            seen[move] = seen.get(move, 0) + (sheets[1].get(move, 0.0) >= 0.8 * worth)
    for move, count in possible.items():
        assert seen[move] / count > 0.15, (move, seen[move] / count)
