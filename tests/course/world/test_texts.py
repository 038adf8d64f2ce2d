"""What the world writes: the same each time, in its own words, and with a clean held-out split."""

import itertools
from random import Random

import pytest
from minirlhf_course.world import GoldLabeler, World, make_labelers
from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.facts import ATTRIBUTES
from minirlhf_course.world.families import REGISTRY
from minirlhf_course.world.gold import split_sentences
from minirlhf_course.world.grammar import Template
from minirlhf_course.world.vocabulary import heldout_words
from minirlhf_course.world.write import comparisons
from minirlhf_course.world.writer import Writer

FAMILIES = [kind.name for kind in REGISTRY]


@pytest.mark.parametrize(
    "make",
    [
        lambda w, seed: CorpusWriter(w).documents(50, seed),
        lambda w, seed: w.prompts(50, seed),
        lambda w, seed: w.prompts(50, seed, heldout=True),
        lambda w, seed: w.demonstrations(50, seed),
        lambda w, seed: comparisons(w, 20, seed, make_labelers(w)),
    ],
)
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(world: World, make) -> None:
    assert make(world, 3) == make(World(seed=0), 3)
    assert make(world, 3) != make(world, 4)


def test_the_world_seed_changes_tastes_and_nothing_else(world: World) -> None:
    other = World(seed=1)
    assert other.vocabulary == world.vocabulary
    assert other.facts.value("frog", "home") == world.facts.value("frog", "home") == "in a pond"
    joys = [[w.facts.value(being, "joy") for being in ("frog", "owl", "fox", "king")] for w in (world, other)]
    assert joys[0] != joys[1]


def test_the_vocabulary_is_closed_and_small(world: World, web: CorpusWriter, labelers) -> None:
    vocabulary = world.vocabulary
    assert vocabulary == sorted(set(vocabulary))
    assert len(vocabulary) <= 508 and "\n" in vocabulary
    assert all(word == word.lower() and " " not in word and word for word in vocabulary)
    texts = web.documents(2000, seed=5) + web.documents(200, seed=5, heldout=True)
    texts += [text for pair in world.demonstrations(1000, seed=5) for text in pair]
    for heldout in (False, True):
        texts += world.prompts(500, seed=5, heldout=heldout)
        for row in comparisons(world, 150, 5, labelers, heldout=heldout):
            texts += row["responses"]
    known = set(vocabulary)
    for text in texts:
        assert known.issuperset(text.split(" ")), text


def test_the_training_split_teaches_every_word(world: World, web: CorpusWriter) -> None:
    seen = {word for text in web.documents(20_000, seed=0) for word in text.split(" ")}
    assert set(world.vocabulary) <= seen


def test_lengths_and_line_breaks(world: World, labelers) -> None:
    for prompt, completion in world.demonstrations(1500, seed=2):
        assert 1 <= len(completion.split(" ")) <= 40 and "\n" not in completion
        assert len(prompt.split(" ")) <= 30 and "\n" not in prompt
    counts = set()
    for row in comparisons(world, 200, 2, labelers):
        counts.add(len(row["responses"]))
        assert len(row["responses"]) == len(row["scores"]) == len(set(row["responses"]))
        assert all(1 <= len(answer.split(" ")) <= 40 and "\n" not in answer for answer in row["responses"])
    assert counts == {4, 5, 6, 7, 8, 9}


def test_every_prompt_is_understood_by_its_own_family(world: World, gold: GoldLabeler) -> None:
    for family, heldout in itertools.product(FAMILIES, (False, True)):
        rng = Random(family)
        for _ in range(150):
            task = world.task(rng, heldout, family)
            parsed = world.parse(task.prompt)
            assert (parsed.family, dict(parsed.slots), parsed.heldout) == (family, dict(task.slots), heldout)
            assert gold.family(task.prompt) == family


def test_a_text_that_is_no_prompt_is_refused_by_name(gold: GoldLabeler) -> None:
    with pytest.raises(ValueError, match="not a prompt of the small world: 'sing me the blues'"):
        gold.score("sing me the blues", "la la")


def test_the_papers_examples_are_training_prompts(world: World) -> None:
    assert not world.parse("explain the moon landing to a 6 year old in a few sentences").heldout
    assert not world.parse("write a story about frogs").heldout


def test_the_heldout_split_is_disjoint(world: World, web: CorpusWriter) -> None:
    train = set(world.prompts(4000, seed=0)) | {prompt for prompt, _ in world.demonstrations(1500, seed=0)}
    train |= {line for text in web.documents(6000, seed=0) for line in text.split(" \n ") if world.is_prompt(line)}
    heldout = set(world.prompts(4000, seed=0, heldout=True))
    assert len(heldout) >= 600 and not heldout & train
    forbidden = heldout_words()
    about = [prompt for prompt in train if not world.families[world.parse(prompt).family].may_mention_heldout]
    assert len(about) > 300 and not any(forbidden & set(prompt.split(" ")) for prompt in about)
    phrasings = {world.parse(prompt).phrasing for prompt in train}
    # all three ways of being new occur: a new being, a new phrasing, a new pair of family and being
    texts = {name for name, family in world.families.items() if family.may_mention_heldout}
    by_being = [p for p in heldout if forbidden & set(p.split(" ")) and world.parse(p).family not in texts]
    by_phrasing = [p for p in heldout if world.parse(p).phrasing not in phrasings]
    by_pair = [p for p in heldout if p not in by_being and p not in by_phrasing]
    assert min(len(by_being), len(by_phrasing), len(by_pair)) >= 50


def test_answers_of_the_training_split_name_a_heldout_being_only_where_the_prompt_does(world: World, labelers) -> None:
    forbidden, named = heldout_words(), 0
    pairs = world.demonstrations(1500, seed=3)
    for row in comparisons(world, 400, 3, labelers):
        pairs += [(row["prompt"], response) for response in row["responses"]]
    for prompt, response in pairs:
        if forbidden & set(response.split(" ")):
            named += 1
            assert forbidden & set(prompt.split(" ")), (prompt, response)
    assert named > 50


def test_the_web_teaches_the_facts_about_heldout_beings(world: World, web: CorpusWriter) -> None:
    corpus = "\n".join(web.documents(5000, seed=0))
    for being in ("penguin", "witch"):
        for attribute in ATTRIBUTES:
            assert world.facts.sentence(being, attribute) in corpus


def test_the_web_holds_instructions_that_nobody_answers(world: World, web: CorpusWriter) -> None:
    lists = answered = 0
    documents = web.documents(2000, seed=1)
    for text in documents:
        lines = text.split(" \n ")
        if len(lines) > 1:
            lists += all(world.is_prompt(line) for line in lines)
            answered += not world.is_prompt(lines[1])
    assert 0.10 < lists / len(documents) < 0.17
    assert 0.09 < answered / len(documents) < 0.15


def test_a_template_reads_what_it_writes() -> None:
    template = Template("the {a:being} and the {b:being} hid the {t:thing} . where is the {t:thing} ?")
    slots = {"a": "fox", "b": "owl", "t": "key"}
    assert template.read(template.fill(slots)) == slots
    assert template.read("the fox and the owl hid the key . where is the cup ?") is None
    with pytest.raises(KeyError):
        template.fill({"a": "fox"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sentence_of_a_demonstration_is_understood(world: World, family: str) -> None:
    rng = Random(1)
    kind = world.families[family]
    for _ in range(200):
        text = kind.draft(world.task(rng, family=family), Writer(rng))
        for part in split_sentences(text.split(" ")):
            assert kind.read_sentence(part).name, part
