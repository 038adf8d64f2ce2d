"""Large data: what a row and a token may take, how much of a corpus is encoded, and a step's cost at three sizes."""

import pickle
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minirlhf.config import RunConfig
from minirlhf.data import Comparison, Demonstration, Prompt, Text, read_folder
from minirlhf.formats import Conversation
from minirlhf.language.dpo import DPOConfig, train_dpo
from minirlhf.language.grpo import GRPOConfig, train_grpo
from minirlhf.language.models import scalar_model_from
from minirlhf.language.pretraining import PretrainingConfig, blocks_of, train_base
from minirlhf.language.reward_model import RewardModelConfig, encode_comparisons, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.language.tokenization import CHUNK, encode_prompts, encode_responses, encode_texts, in_chunks
from minirlhf.pipeline import beside, inputs
from minirlhf.pipeline.inputs import load_inputs
from minirlhf.training import Recorder

CHAT = Conversation([("system", "Be brief."), ("user", "Why?")])


def test_tokens_are_those_of_one_call_for_all_texts(tokenizer) -> None:
    texts = [f"say {i} <eos>" for i in range(CHUNK + 5)]
    for encode in (encode_prompts, encode_responses, encode_texts):
        rows = list(in_chunks(encode, tokenizer, iter(texts)))
        assert [row.tolist() for row in rows] == encode(tokenizer, texts)
        assert {row.itemsize for row in rows} == {4}
    ranked = [
        Comparison(CHAT, ("x", "y", "z"), (1.5, -2.0, 1e30), "ann", "comparisons.parquet:70000"),
        Comparison("Hi", ("x", "y"), (1.0, 0.0)),
    ]
    prompts = encode_prompts(tokenizer, [row.prompt for row in ranked])
    want = [[p + r for r in encode_responses(tokenizer, row.responses)] for p, row in zip(prompts, ranked, strict=True)]
    assert [[answer.tolist() for answer in row] for row in encode_comparisons(tokenizer, ranked)] == want
    ids = encode_responses(tokenizer, texts[:7])
    flat = torch.tensor([token for row in ids for token in row])
    blocks = flat[: len(flat) // 4 * 4].view(-1, 4)
    assert torch.equal(blocks_of(ids, 4), blocks) and blocks_of(ids, 4).dtype == torch.int64
    assert torch.equal(blocks_of(iter(ids), 4, most=3), blocks[:3])
    assert len(blocks_of(ids, 4, most=10_000)) == len(blocks)
    assert len(blocks_of(ids, 1, most=1)) == 1


def test_a_row_takes_its_text_and_little_more(tmp_path: Path, tiny_folder: Path) -> None:
    for file in tiny_folder.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(f'{{"text": "{i} frogs sit by the pond and say nothing at all"}}\n' for i in range(20_000)))
    tracemalloc.start()
    try:
        data = read_folder(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data.corpus) == 18_000 and len(data.heldout_corpus) == 2_000
    assert (peak - file.stat().st_size) / 20_000 < 300, "bytes per row, without its text"


@pytest.mark.parametrize("fewest", [1, 10, 1000])
def test_as_many_rows_of_the_corpus_are_encoded_as_the_steps_read(
    tiny_folder: Path, tmp_path: Path, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "FEWEST_BLOCKS", fewest)
    config = RunConfig(data=tiny_folder, out=tmp_path)
    base = replace(config.base, steps=2, batch_size=2, block_length=8)
    config = replace(config, base=base, rlhf=replace(config.rlhf, steps=1, ptx_batch_size=3, minibatch_size=64))
    found = load_inputs(config, tiny_folder)
    whole = blocks_of(encode_texts(found.tokenizer, [row.text for row in found.folder.corpus]), 8)
    assert config.rlhf.batch_size == 128 and config.rlhf.epochs == 1
    enough = max(6, fewest)  # base reads 4 blocks, the two minibatches of PPO-ptx 3 each
    notes = [note for note in found.folder.notes if "rows of the corpus" in note]
    if len(whole) < 2 * enough:
        assert torch.equal(found.corpus_blocks, whole) and not notes
    else:
        assert enough * 0.7 <= len(found.corpus_blocks) < len(whole) and len(notes) == 1
        assert f"{8 * enough:,} tokens" in notes[0]


@pytest.mark.parametrize(("step", "read"), [("ppo", False), ("ppo_ptx", False), ("dpo", True)])
def test_the_step_beside_is_handed_what_it_reads(tiny_folder: Path, tmp_path: Path, step: str, read: bool) -> None:
    config = RunConfig(data=tiny_folder, out=tmp_path)
    found = load_inputs(replace(config, base=replace(config.base, block_length=8)), tiny_folder)
    prompts = [*found.folder.prompts[1:], Prompt(CHAT, "p.jsonl:1")]
    found.folder.prompts = prompts
    handed = pickle.loads(pickle.dumps(beside._read_by(step, config, found)))
    assert handed.folder.prompts == prompts and handed.folder.prompts[-1].text.messages == CHAT.messages
    assert bool(handed.folder.comparisons) == read and not handed.folder.demonstrations and not handed.folder.corpus
    assert handed.folder.heldout_prompts == found.folder.heldout_prompts
    assert torch.equal(handed.corpus_blocks, found.corpus_blocks[: None if step == "ppo_ptx" else 0])
    assert encode_prompts(handed.tokenizer, ["Hi <eos>", CHAT]) == encode_prompts(found.tokenizer, ["Hi <eos>", CHAT])
    assert found.folder.demonstrations, "the run's own are untouched"


class Counting(Recorder):
    """Counts what step 2 of 4 does: calls of functions, and numbers that are shuffled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("x", progress=False)
        self.calls = self.shuffled = 0
        shuffle = torch.randperm

        def counted(count: int, **options) -> torch.Tensor:
            self.shuffled += count
            return shuffle(count, **options)

        monkeypatch.setattr(torch, "randperm", counted)

    def steps(self, total: int, done=None):
        def count(frame, event: str, argument) -> None:
            self.calls += event in ("call", "c_call")

        for step in super().steps(total, done):
            if step == 2:
                self.shuffled = 0
                sys.setprofile(count)
            yield step
            if step == 2:
                sys.setprofile(None)
                self.found = self.calls, self.shuffled


@pytest.mark.parametrize("name", ["base", "sft", "reward_model", "rlhf", "grpo", "dpo"])
def test_a_step_costs_the_same_with_a_hundred_times_the_rows(
    name: str, make_causal, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are alike, so that whichever a step draws are as long as any others."""
    found = []
    for count in (80, 800, 8000):
        recorder, model, batch = Counting(monkeypatch), make_causal("gpt2"), {"batch_size": 4, "warmup": 1}
        blocks, few = torch.full((count, 6), 5), {"epochs": 16 / count, **batch}
        ranked = [Comparison("Hi", ("a frog", "a toad"), (1.0, 0.0))] * count
        sampled = {"steps": 4, "batch_size": 4, "minibatch_size": 2, "max_response_tokens": 4, "ptx_coef": 0.1}
        mixed = {"corpus_blocks": blocks, "recorder": recorder}

        def reward(prompts, answers):
            return [float(place) for place in range(len(prompts))]

        if name == "base":
            train_base(model, blocks, PretrainingConfig(steps=4, **batch), recorder=recorder)
        elif name == "sft":
            train_sft(model, tokenizer, [Demonstration("Hi", "a frog")] * count, SFTConfig(**few), recorder=recorder)
        elif name == "reward_model":
            train_reward_model(model, tokenizer, ranked, RewardModelConfig(**few), recorder=recorder)
        elif name == "dpo":
            config = DPOConfig(measured_prompts=0, **few)
            train_dpo(model, make_causal("gpt2"), tokenizer, ranked, config, recorder=recorder)
        elif name == "grpo":
            config = GRPOConfig(group_size=2, **sampled)
            train_grpo(model, make_causal("gpt2"), reward, tokenizer, ["Hi"] * count, config, **mixed)
        else:
            parts = scalar_model_from(model, seed=2), make_causal("gpt2"), reward
            train_rlhf(model, *parts, tokenizer, ["Hi"] * count, RLHFConfig(**sampled), **mixed)
        found.append(recorder.found)
    assert all(calls > 100 for calls, _ in found)
    assert len({shuffled for _, shuffled in found}) == 1, found
    assert max(calls for calls, _ in found) <= 1.02 * min(calls for calls, _ in found), found


def test_rows_have_no_dictionary_and_go_through_a_pipe() -> None:
    for row in (Text("a"), Demonstration("a", "b"), Comparison("a", ("b", "c"), (1.0, 0.0)), Prompt(CHAT)):
        assert not hasattr(row, "__dict__") and pickle.loads(pickle.dumps(row)) == row
