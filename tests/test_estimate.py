"""What a run would take, said before it trains: held to what real steps take, and refused where it is too much."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf import cli, parallel
from minirlhf.config import RunConfig, preset
from minirlhf.errors import UserError
from minirlhf.language import llama
from minirlhf.memory import Models, Shape
from minirlhf.pipeline import estimate, steps
from minirlhf.pipeline.estimate import GIB, Need, Size, at_most, check_memory, memory_of, shape_of, trial, work_of

ALONE, NAME = "MINIRLHF_TEST_ALONE", "test_the_formula_is_what_a_step_takes"
CPU = torch.device("cpu")
SHAPE = Shape(layers=2, width=64, intermediate=160, vocabulary=500)
SIZE = Size(
    SHAPE,
    longest=50,
    prompt=10.0,
    answer=20.0,
    demonstrations=1000,
    comparisons=300,
    heldout_comparisons=30,
    heldout_prompts=900,
    answers=4,
)


def fresh(**settings: Any) -> RunConfig:
    """Of a run that has no folder yet."""
    return RunConfig(out=Path("no/such/run"), **settings)


ALL = fresh(method=("ppo", "ppo_ptx", "rloo", "grpo", "dpo"))


def needs(config: RunConfig, size: Size = SIZE) -> dict[str, Need]:
    return {need.step: need for need in memory_of(config, size, CPU)}


def saved_model(folder: Path, tokenizer: Any, kind: str = "llama", **changes: int) -> Path:
    """A model's configuration and tokenizer, without weights."""
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    kinds: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "gpt2": GPT2Config, "qwen3": Qwen3Config}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": True} | changes
    kinds[kind](**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_each_step_holds_its_own_models() -> None:
    found, p, scalar = needs(ALL), SHAPE.weights, SHAPE.body + SHAPE.width
    assert list(found) == ["base", "sft", "reward_model", "ppo", "ppo_ptx", "rloo", "grpo", "dpo", "evaluation"]
    assert found["base"].models == found["sft"].models == 16 * p
    assert found["reward_model"].models == 16 * scalar + 4 * p
    assert found["ppo"].models == found["ppo_ptx"].models == 20 * (p + scalar)
    assert found["rloo"].models == found["grpo"].models == 20 * p + 4 * scalar
    assert found["dpo"].models == 20 * p
    assert found["evaluation"].models == 4 * (7 * p + scalar)
    own = needs(replace(ALL, reward="reward.py:score", method=("ppo", "grpo")))
    assert "reward_model" not in own
    assert own["grpo"].models == 20 * p and own["ppo"].models == 16 * (p + scalar) + 4 * p
    given = needs(replace(ALL, given_sft="folder", given_reward_model="other", method=("dpo",)))
    assert list(given) == ["dpo", "evaluation"]
    alone = fresh(model="folder", given_reward_model="other")
    assert work_of("base", alone, SIZE) == work_of("reward_model", alone, SIZE) == (0, 0, 0, 0)
    assert work_of("sft", alone, SIZE).trained == 30 * SIZE.demonstrations * alone.sft.epochs


def test_what_grows_with_the_batch() -> None:
    usual = needs(ALL)
    for step, change in (
        ("base", {"batch_size": 256}),
        ("sft", {"batch_size": 10_000, "micro_batch_tokens": 16_384}),
        ("reward_model", {"batch_size": 10_000, "micro_batch_tokens": 32_768}),
        ("dpo", {"batch_size": 10_000, "micro_batch_tokens": 32_768}),
        ("rlhf", {"minibatch_size": 128, "micro_batch_tokens": 16_384}),
    ):
        larger = needs(replace(ALL, **{step: replace(getattr(ALL, step), **change)}))
        name = "ppo" if step == "rlhf" else step
        assert larger[name].rest > 1.5 * usual[name].rest and larger[name].models == usual[name].models, step
    # A micro-batch holds at least one row, or all answers to a prompt, however little it should.
    least = {name: replace(getattr(ALL, name), micro_batch_tokens=1) for name in ("sft", "reward_model")}
    one = needs(replace(ALL, **least))
    assert one["reward_model"].rest / SIZE.answers == pytest.approx(
        needs(replace(ALL, **least), SIZE._replace(answers=1))["reward_model"].rest
    )
    assert 0 < one["sft"].rest < usual["sft"].rest / 3
    # Sampling: all answers at once, unless the cache is limited.
    wide = replace(ALL, rlhf=replace(ALL.rlhf, batch_size=4096, minibatch_size=16))
    narrow = replace(wide, rlhf=replace(wide.rlhf, cache_tokens=1000))
    assert needs(narrow)["ppo"].rest < needs(wide)["ppo"].rest / 3


def test_two_at_a_time_and_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = fresh(), needs(fresh())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    both = at_most(config, list(found.values()), CPU)
    assert both.step == "ppo beside ppo_ptx" and both.total == found["ppo"].total + found["ppo_ptx"].total
    alone = replace(config, side_by_side=False)
    largest = max(found.values(), key=lambda need: need.total)
    assert at_most(alone, list(found.values()), CPU) == largest
    monkeypatch.setattr(parallel, "size", lambda: 2)
    twice = at_most(config, [Need("ppo", 100, 10)], CPU)
    assert twice == Need("ppo", 200, 20) and at_most(config, [Need("ppo", 100, 10)], torch.device("cuda")).total == 110
    assert at_most(replace(config, shard=True), [Need("ppo", 100, 10)], CPU) == Need("ppo", 100, 20)
    share = needs(config)
    assert share["base"].rest == pytest.approx(found["base"].rest / 2), "each process has half of a batch"
    whole = replace(config.rlhf, batch_size=64, minibatch_size=64, micro_batch_tokens=10**6)
    half = replace(config.rlhf, batch_size=32, minibatch_size=32, micro_batch_tokens=10**6)
    shared = needs(replace(config, rlhf=whole))["ppo"]
    monkeypatch.setattr(parallel, "size", lambda: 1)
    assert shared == needs(replace(config, rlhf=half))["ppo"]


@pytest.mark.parametrize("step", ["sft", "reward_model", "dpo"])
def test_the_formula_is_what_a_step_takes(step: str, tokenizer: Any, tiny_folder: Path) -> None:
    """The peak of all that torch allocates, in the second of two equal steps: the estimate is this or a little more.

    A Llama's last layer computes only what is asked of it, which the formula doesn't know.
    """
    if ALONE not in os.environ:  # the profiler misses allocations in a process that has used it before
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::{NAME}[{step}]"]
        done = subprocess.run(command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    from minirlhf.data import Comparison, Demonstration
    from minirlhf.language.dpo import DPOConfig, train_dpo
    from minirlhf.language.models import clone
    from minirlhf.language.reward_model import RewardModelConfig, train_reward_model
    from minirlhf.language.sft import SFTConfig, train_sft
    from minirlhf.language.tokenization import encode_prompts, encode_responses
    from minirlhf.training import Recorder

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4000, tie_word_embeddings=True, **sizes))
    said = ["the otter sits by the pond and says a word about the newt", "the newt sits by the pond and says no word"]
    prompt, answers = (len(encode_prompts(tokenizer, ["Say it."])[0]), encode_responses(tokenizer, said))
    longest = prompt + max(map(len, answers))
    size = Size(Shape(6, 128, 352, 4000), longest, prompt, len(answers[0]), 16, 16, 0, 0, 2)
    few: Any = {"batch_size": 8, "epochs": 1.0, "micro_batch_tokens": 4 * longest}
    group = {
        "sft": SFTConfig(**few),
        "reward_model": RewardModelConfig(**few),
        "dpo": DPOConfig(**few, measured_prompts=0),
    }[step]
    expected = needs(fresh(method=("dpo",), **{step: group}), size)[step]
    shown = [Demonstration("Say it.", said[0])] * 16
    ranked = [Comparison("Say it.", tuple(said), (1.0, 0.0))] * 16
    recorder = Recorder(step, progress=False)

    def work() -> object:
        if step == "sft":
            return train_sft(model, tokenizer, shown, group, recorder=recorder)
        if step == "reward_model":
            return train_reward_model(model, tokenizer, ranked, group, recorder=recorder)
        return train_dpo(clone(model).requires_grad_(True), model, tokenizer, ranked, group, recorder=recorder)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    now = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    found = highest + sum(p.nbytes for p in model.parameters())
    assert kept is not None
    print(f"{step}: estimate {expected.total / 2**20:.1f} MiB, measured {found / 2**20:.1f} MiB", expected)
    assert 0.95 < expected.total / found < 1.15


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_size_of_a_model_that_is_given(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    from minirlhf.language.models import count_weights

    widths = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {} if kind == "gpt2" else {"num_key_value_heads": 2, "intermediate_size": 200, "head_dim": 32}
    folder = saved_model(tmp_path, tokenizer, kind, **widths, **more)
    shape = shape_of(fresh(model=str(folder)), 10)
    assert shape.weights == pytest.approx(count_weights(folder), rel=0.01)
    assert (shape.layers, shape.width, shape.vocabulary) == (3, 96, len(tokenizer))
    assert shape.keys == (96 if kind == "gpt2" else 64)
    scratch = shape_of(fresh(), 301)
    assert all(seconds > 0 for seconds in trial(fresh(), SIZE._replace(shape=shape), 2, CPU))
    assert scratch.vocabulary == 301 and scratch.width == fresh().model_size.hidden_size


def test_a_model_too_large_is_refused_before_it_is_loaded(
    tmp_path: Path, tokenizer: Any, tiny_folder: Path, refused: Callable[..., str]
) -> None:
    """This folder has no weights: the next thing that the run would miss."""
    sizes = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    folder = saved_model(tmp_path / "large", tokenizer, intermediate_size=400_000, **sizes)
    command = ["run", "--model", str(folder), "--data", str(tiny_folder), "--out", str(tmp_path / "out")]
    command += ["--base.block-length", "8", "--device", "cpu"]
    said = refused(command)
    assert "GiB of memory" in said and "are free on cpu" in said and "--allow-oversize" in said
    assert (
        "--lora.rank 16" in said and "a smaller --rlhf.micro-batch-tokens" in said and not (tmp_path / "out").exists()
    )
    assert "weights" in refused([*command, "--allow-oversize"])
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_starts_only_if_allowed(
    tmp_path: Path, fast_run: Callable[..., list[str]], refused: Callable[..., str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 2**20)
    out = tmp_path / "out"
    said = refused(fast_run(out, "--no-side-by-side"))
    assert "would take about" in said and "1 MiB are free on cpu" in said and not out.exists()
    assert "--no-side-by-side" not in said and "--lora" not in said, "this would not help here"
    few = ["--base.steps", "2", "--rlhf.steps", "1", "--sft.epochs", "0.02", "--reward-model.epochs", "0.02"]
    allowed = fast_run(out, "--allow-oversize", *few, "--evaluation.prompts", "4", "--method", "ppo")
    assert cli.main(allowed) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("estimate: ")]
    assert len(lines) == 1 and lines[0].endswith(", less than a minute left"), lines
    assert "allow_oversize" not in json.loads((out / "config.json").read_text()), "a run may go on without it"


def test_a_step_begins_without_the_last_ones_gradients_and_moments(
    tmp_path: Path, fast_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    living, found = weakref.WeakSet[torch.optim.Optimizer](), dict[str, int]()
    made, trained = torch.optim.AdamW.__init__, steps._train

    def making(self, *args, **options) -> None:
        made(self, *args, **options)
        living.add(self)

    def training(step: str, *args) -> object:
        found[step] = len(living)
        return trained(step, *args)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", making)
    monkeypatch.setattr(steps, "_train", training)
    few = ["--base.steps", "2", "--rlhf.steps", "1", "--sft.epochs", "0.02", "--reward-model.epochs", "0.02"]
    gc.disable()  # which would run by itself now and then
    try:
        assert cli.main(fast_run(tmp_path, *few, "--evaluation.prompts", "4", "--no-side-by-side")) == 0
    finally:
        gc.enable()
    assert found == dict.fromkeys(("base", "sft", "reward_model", "ppo", "ppo_ptx"), 0)


def test_the_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(estimate, "CGROUPS", ((str(most), str(used)),))
    machine = estimate.free_memory(CPU)
    used.write_text("300000\n")
    most.write_text("max\n")
    assert estimate.free_memory(CPU) == (machine if machine is None else pytest.approx(machine, rel=0.5))
    most.write_text("1000000\n")
    assert estimate.free_memory(CPU) == 700_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 1000\n")
    assert estimate.free_memory(CPU) == 751_000
    with pytest.raises(UserError, match=r"\b1 MiB are free"):
        check_memory(fresh(), SIZE, CPU)


def test_where_nobody_knows_the_memory_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: None)
    huge = SIZE._replace(shape=Shape(100, 10**5, 10**6, 10**6))
    assert check_memory(fresh(), huge, CPU).total > 1000 * GIB


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_work_is_what_a_run_computes(method: str, tmp_path: Path, tiny_folder: Path, monkeypatch) -> None:
    """Tokens that go through the models in a run, padding included, against the count made before it."""
    from minirlhf.pipeline.inputs import load_inputs
    from minirlhf.pipeline.steps import train_step

    config = replace(preset("fast"), out=tmp_path, data=tiny_folder, method=(method,), device="cpu")
    sampled = {"steps": 3, "batch_size": 8, "minibatch_size": 4, "max_response_tokens": 16}
    config = replace(
        config,
        base=replace(config.base, steps=4, block_length=8),
        **{name: replace(getattr(config, name), **sampled) for name in ("rlhf", "grpo")},
        dpo=replace(config.dpo, epochs=1.0, measured_prompts=4, max_response_tokens=16),
        sft=replace(config.sft, epochs=1.0),
        reward_model=replace(config.reward_model, epochs=1.0),
    )
    inputs = load_inputs(config, tiny_folder)
    counted, forward, step_of = {"trained": 0, "seen": 0, "drawn": 0}, llama.forward, llama.Cache.step

    def counting(base, tokens, *rest):
        counted["trained" if torch.is_grad_enabled() else "seen"] += len(tokens)
        return forward(base, tokens, *rest)

    def drawing(self):
        counted["drawn"] += 1
        return step_of(self)

    monkeypatch.setattr(llama, "forward", counting)
    monkeypatch.setattr(llama.Cache, "step", drawing)
    for step in ("base", "sft", "reward_model", method):
        counted.update(dict.fromkeys(counted, 0))
        train_step(step, config, inputs, progress=False)
        work = work_of(step, config, inputs.size)
        print(step, counted, work)
        assert 0.5 < work.trained / counted["trained"] < 2, step
        if step in ("base", "sft"):
            assert work.seen == counted["seen"] == work.drawn == counted["drawn"] == 0
        if step in ("reward_model", method):
            assert 0.4 < work.seen / counted["seen"] < 2.5
        if step == method:
            assert counted["drawn"] <= work.drawn <= 3 * counted["drawn"]


@pytest.mark.parametrize(
    ("width", "keys"), [(64, 32), (33, 33), (96, 64), (2560, 1024), (640, 256), (2304, 1024), (30, 40), (48, 5)]
)
def test_a_trial_takes_any_width(width: int, keys: int) -> None:
    """Those of Qwen3, of Gemma 2 and 3, keys wider than the model, and odd numbers."""
    shape = Shape(2, width, 2 * width, 100, keys)
    speed = trial(fresh(), SIZE._replace(shape=shape), 2, CPU)
    assert all(seconds > 0 for seconds in speed)


def test_what_is_done_is_not_counted_and_a_gpu_holds_no_logits(tmp_path: Path) -> None:
    config = RunConfig(out=tmp_path)
    for step in ("base", "ppo"):
        (tmp_path / step).mkdir()
    assert list(needs(config)) == ["sft", "reward_model", "ppo_ptx", "evaluation"]
    gpu = {need.step: need for need in memory_of(config, SIZE, torch.device("cuda"))}
    assert gpu["sft"].rest < needs(config)["sft"].rest and gpu["reward_model"] == needs(config)["reward_model"]


def test_only_what_helps_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    wide = SIZE._replace(shape=Shape(2, 64, 160, 10**6))
    for config, size, helps, not_ in (
        (
            fresh(side_by_side=False),
            SIZE,
            ["--gradient-checkpointing", "rlhf.micro-batch"],
            ["--no-side", "--lora"],
        ),
        (fresh(model="m"), SIZE, ["--lora.rank 16"], ["--shard"]),
        (
            fresh(previous=Path("x"), side_by_side=False),
            SIZE,
            ["try a smaller model"],
            ["checkpointing", "micro-batch-t"],
        ),
        (fresh(model="m", method=("dpo",), given_reward_model="r"), wide, ["bfloat16"], ["reward-model", "--sft"]),
    ):
        with pytest.raises(UserError) as caught:
            check_memory(config, size, CPU)
        said = str(caught.value)
        assert all(way in said for way in helps) and not any(way in said for way in not_), said


def test_a_trial_leaves_no_trace() -> None:
    torch.manual_seed(3)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    speed = trial(fresh(), SIZE, 8, CPU)
    assert all(seconds > 0 for seconds in speed)
    total = estimate.seconds_of(fresh(), SIZE, ["base", "ppo", "ppo_ptx", "evaluation"], CPU)
    assert 0 < total < 10_000 and torch.get_num_threads() == threads
    assert torch.equal(state, torch.get_rng_state())
    assert estimate.seconds_of(fresh(), SIZE, [], CPU) == 0


def test_adapters_and_low_precision_are_counted() -> None:
    full = needs(fresh(model="m", method=("ppo",)))["ppo"]
    adapted = replace(fresh(model="m", method=("ppo",)), lora=replace(fresh().lora, rank=4))
    low = replace(adapted, precision="bfloat16", gradient_checkpointing=True)
    assert needs(low)["ppo"].total < needs(adapted)["ppo"].total < full.total
    assert needs(adapted)["ppo"].models < full.models / 4
    assert Models(1, 1).weights(SHAPE) == SHAPE.weights + SHAPE.body + SHAPE.width
