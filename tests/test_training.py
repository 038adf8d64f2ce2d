"""Kill and resume gives the same bits; batches are what they say; a NaN never reaches the weights."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.checkpoints import STATE, load_state, save_model, save_state, verify_model
from minirlhf.data import Comparison, Demonstration
from minirlhf.errors import CheckpointError, TrainingError, UserError
from minirlhf.language.models import clone, scalar_model_from
from minirlhf.language.pretraining import PretrainingConfig, train_base
from minirlhf.language.reward_model import RewardModelConfig, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.training import (
    Recorder,
    adamw,
    epoch_batch,
    generator_for,
    learning_rate_factor,
    length_grouped_batch,
    micro_batches,
)

TEXTS = [f"The {a} {v} by the {p}." for a in ("otter", "newt") for v in ("naps", "digs") for p in ("barn", "marsh")]
DEMONSTRATIONS = [Demonstration(f"say {i}", text) for i, text in enumerate(TEXTS)]
COMPARISONS = [Comparison(f"say {i}", (text, text[:9], "No."), (2.0, 1.0, 0.0)) for i, text in enumerate(TEXTS)]


class Killed(Exception):
    pass


class Mortal(Recorder):
    """A recorder that dies inside the given step, after the step's metrics were written."""

    def __init__(self, *arguments, die_at: int | None = None, **settings) -> None:
        super().__init__(*arguments, progress=False, **settings)
        self.die_at = die_at

    def log(self, metrics) -> None:
        super().log(metrics)
        if self._step == self.die_at:
            raise Killed


def _base(make_causal, tokenizer, recorder, architecture):
    model = make_causal(architecture)
    blocks = torch.randint(2, len(tokenizer), (10, 12), generator=torch.Generator().manual_seed(0))
    return train_base(model, blocks, PretrainingConfig(steps=5, batch_size=4, warmup=1), recorder=recorder)


def _sft(make_causal, tokenizer, recorder, architecture):
    config = SFTConfig(epochs=2.5, batch_size=4, warmup=1)
    return train_sft(make_causal(architecture), tokenizer, DEMONSTRATIONS, config, recorder=recorder)


def _reward_model(make_causal, tokenizer, recorder, architecture):
    config = RewardModelConfig(epochs=2.5, batch_size=4, warmup=1)
    model = make_causal(architecture)
    return train_reward_model(
        model, tokenizer, COMPARISONS, config, demonstrations=DEMONSTRATIONS, recorder=recorder, seed=3
    )


def _rlhf(make_causal, tokenizer, recorder, architecture):
    model = make_causal(architecture)
    config = RLHFConfig(
        steps=5,
        batch_size=8,
        max_response_tokens=6,
        warmup=1,
        target_kl=0.5,
        kl_horizon=40.0,
        ema_decay=0.5,
        ptx_coef=0.3,
        ptx_batch_size=3,
    )
    blocks = torch.randint(2, len(tokenizer), (7, 12), generator=torch.Generator().manual_seed(0))
    return train_rlhf(
        clone(model),
        scalar_model_from(model, seed=2),
        model,
        lambda prompts, responses: [len(text) / 10 for text in responses],
        tokenizer,
        [row.prompt for row in DEMONSTRATIONS],
        config,
        corpus_blocks=blocks,
        recorder=recorder,
    )


LEARNERS = {"base": _base, "sft": _sft, "reward_model": _reward_model, "rlhf": _rlhf}


def rows(history: list[dict]) -> list[dict]:
    """Metrics without those of the clock."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in history]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", list(LEARNERS))
def test_kill_and_resume_gives_the_same_bits(make_causal, tokenizer, tmp_path, name: str, architecture: str) -> None:
    learner = LEARNERS[name]
    torch.manual_seed(11)
    whole = Mortal(name, tmp_path / "whole", save_seconds=0)
    expected = learner(make_causal, tokenizer, whole, architecture)
    assert len(whole.history) == 5

    # Die twice: after step 1 was computed but not saved, and again two steps later.
    torch.manual_seed(12)
    for die_at in (1, 3):
        with pytest.raises(Killed):
            learner(make_causal, tokenizer, Mortal(name, tmp_path / "cut", save_seconds=0, die_at=die_at), architecture)
        written = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        assert len(written) == die_at + 1
        assert load_state(tmp_path / "cut" / STATE)[1]["step"] == die_at
    last = Mortal(name, tmp_path / "cut", save_seconds=0)
    resumed = learner(make_causal, tokenizer, last, architecture)
    assert last.first_step == 3

    for key, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert rows(last.history) == rows(whole.history)
    on_disk = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert rows(on_disk) == rows(whole.history)
    if name == "reward_model":
        assert resumed.config.score_offset == expected.config.score_offset
    if name == "rlhf":
        facts = load_state(tmp_path / "cut" / STATE)[1]
        assert facts["extras"]["kl"]["beta"] != 0.1
        assert facts["extras"] == load_state(tmp_path / "whole" / STATE)[1]["extras"]
        tensors = load_state(tmp_path / "cut" / STATE)[0]
        assert {key.split("/")[1] for key in tensors if key.startswith("model/")} == {"policy", "value", "average"}


def test_a_finished_state_is_not_trained_again(make_causal, tokenizer, tmp_path) -> None:
    first = Mortal("sft", tmp_path, save_seconds=1e9)
    expected = _sft(make_causal, tokenizer, first, "llama")
    again = Mortal("sft", tmp_path, die_at=0)
    model = _sft(make_causal, tokenizer, again, "llama")
    assert again.first_step == 5 and rows(again.history) == rows(first.history)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_kill_before_the_first_save_begins_anew(make_causal, tokenizer, tmp_path) -> None:
    with pytest.raises(Killed):
        _sft(make_causal, tokenizer, Mortal("sft", tmp_path, save_seconds=1e9, die_at=2), "llama")
    assert not (tmp_path / STATE).exists()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "sft/lo')  # a line cut by the kill
    last = Mortal("sft", tmp_path)
    _sft(make_causal, tokenizer, last, "llama")
    assert last.first_step == 0 and [row["step"] for row in last.history] == [0, 1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


class TestDamagedState:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = torch.nn.Linear(40, 30)
        recorder = Recorder("x", tmp_path, progress=False)
        recorder.track({"m": model}, {"m": adamw(model, 1e-3)})
        for _ in recorder.steps(1):
            pass
        return tmp_path

    def load(self, folder: Path, model: torch.nn.Module | None = None) -> None:
        model = model or torch.nn.Linear(40, 30)
        Recorder("x", folder, progress=False).track({"m": model}, {"m": adamw(model, 1e-3)})

    @pytest.mark.parametrize("damage", ["cut", "flip data", "flip header", "empty", "text"])
    def test_named(self, folder: Path, damage: str) -> None:
        file = folder / STATE
        payload = bytearray(file.read_bytes())
        if damage == "cut":
            payload = payload[: len(payload) // 2]
        elif damage == "flip data":
            payload[-100] ^= 1
        elif damage == "flip header":
            payload[3] ^= 0xFF
        else:
            payload = bytearray(b"" if damage == "empty" else b"not a checkpoint")
        file.write_bytes(payload)
        with pytest.raises(CheckpointError, match="damaged") as caught:
            self.load(folder)
        assert str(file) in str(caught.value) and "delete" in str(caught.value)

    def test_of_another_model(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="another model") as caught:
            self.load(folder, torch.nn.Linear(40, 31))
        assert str(folder / STATE) in str(caught.value)

    def test_whole_state_loads(self, folder: Path) -> None:
        self.load(folder)

    def test_facts_are_guarded_as_well(self, folder: Path) -> None:
        """A flipped digit of the step or of beta is damage like any other."""
        file = folder / STATE
        payload = file.read_bytes()
        assert payload.count(b'\\"step\\": 1') == 1
        file.write_bytes(payload.replace(b'\\"step\\": 1', b'\\"step\\": 0'))
        with pytest.raises(CheckpointError):
            self.load(folder)

    def test_no_pickle(self, folder: Path) -> None:
        tensors, facts = load_state(folder / STATE)
        save_state(folder / "again.safetensors", tensors, facts)
        assert load_state(folder / "again.safetensors")[1] == facts
        assert not [file for file in folder.iterdir() if file.suffix in (".pt", ".pkl", ".bin")]
        assert not list(folder.glob("*.partial"))


class TestSavedModel:
    @pytest.fixture
    def folder(self, make_causal, tokenizer, tmp_path: Path) -> Path:
        save_model(tmp_path / "model", make_causal(), tokenizer, summary=lambda: {"seconds": 1.0})
        return tmp_path / "model"

    def test_whole(self, folder: Path) -> None:
        verify_model(folder)
        assert not folder.with_name("model.partial").exists()
        assert json.loads((folder / "summary.json").read_text()) == {"seconds": 1.0}

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "summary.json"])
    def test_damage_and_loss_are_named(self, folder: Path, name: str) -> None:
        payload = bytearray((folder / name).read_bytes())
        payload[-5] ^= 1
        (folder / name).write_bytes(payload)
        with pytest.raises(CheckpointError, match="damaged") as caught:
            verify_model(folder)
        assert str(folder / name) in str(caught.value)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="missing"):
            verify_model(folder)

    def test_checksums_damaged_and_folder_missing(self, folder: Path) -> None:
        (folder / "checksums.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"checksums\.json"):
            verify_model(folder)
        for text in ("null", "[]", "{}", '{"config.json": ""}'):
            (folder / "checksums.json").write_text(text)
            with pytest.raises(CheckpointError, match=r"checksums\.json: damaged .* delete"):
                verify_model(folder)
        (folder / "checksums.json").unlink()
        verify_model(folder)  # made elsewhere
        with pytest.raises(CheckpointError, match=r"checksums\.json: missing; delete"):
            verify_model(folder, required=True)
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            verify_model(folder)


@pytest.mark.parametrize("name", ["base", "sft", "reward_model", "rlhf"])
def test_nan_stops_before_the_weights(make_causal, tokenizer, tmp_path, name: str) -> None:
    def poisoned(architecture: str):
        model = make_causal(architecture)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        return model

    if name == "rlhf":
        # A NaN policy can't be sampled from: let the reference be the one that is broken.
        model, broken = make_causal(), poisoned("llama")
        policy = clone(model)
        with pytest.raises(TrainingError, match="rlhf: the loss is nan at step 0") as caught:
            train_rlhf(
                policy,
                scalar_model_from(model, seed=2),
                broken,
                lambda p, r: [0.0] * len(r),
                tokenizer,
                ["a", "b"],
                RLHFConfig(steps=2, batch_size=4, max_response_tokens=4),
                recorder=Mortal("rlhf", tmp_path),
            )
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), model.parameters(), strict=True))
    else:
        with pytest.raises(TrainingError, match=f"{name}: the loss is nan at step 0") as caught:
            LEARNERS[name](lambda a: poisoned(a), tokenizer, Mortal(name, tmp_path), "llama")
    message = str(caught.value)
    assert "lower" in message and str(tmp_path) in message
    assert {"base": "blocks [", "sft": "demonstrations [", "reward_model": "comparisons [", "rlhf": "rows ["}[
        name
    ] in message
    assert not (tmp_path / STATE).exists()


class Square(torch.autograd.Function):
    """A loss that is finite and whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full((3,), float("nan"))


class TestOnlyFiniteStates:
    def train(self, folder: Path, at: int, how: str, steps: int = 4) -> torch.nn.ParameterList:
        model = torch.nn.ParameterList([torch.ones(3)])
        optimizer = adamw(model, 0.1)
        recorder = Recorder("x", folder, save_seconds=0, progress=False)
        recorder.track({"m": model}, {"m": optimizer})
        for step in recorder.steps(steps):
            optimizer.zero_grad()
            loss = Square.apply(model[0]) if (step, how) == (at, "gradient") else model[0].sum()
            recorder.check_finite(loss, f"rows {step}", "lower the rate")
            loss.backward()
            optimizer.step()
            if (step, how) == (at, "weights"):
                with torch.no_grad():
                    model[0][1] = float("inf")
        return model

    @pytest.mark.parametrize("how", ["gradient", "weights"])
    def test_the_state_that_the_message_names_is_finite(self, tmp_path: Path, how: str) -> None:
        with pytest.raises(TrainingError, match="at step 2, rows 2; lower the rate") as caught:
            self.train(tmp_path, 2, how)
        assert "gradient's norm is nan" in str(caught.value) or how == "weights"
        assert f"Delete {tmp_path} to" in str(
            caught.value
        ) and f"before step 2, all finite, are in {tmp_path / STATE}" in str(caught.value)
        tensors, facts = load_state(tmp_path / STATE)
        assert facts["step"] == 2 and all(value.isfinite().all() for value in tensors.values())

    @pytest.mark.parametrize("how", ["gradient", "weights"])
    def test_no_state_is_named_where_there_is_none(self, tmp_path: Path, how: str) -> None:
        with pytest.raises(TrainingError, match="at step 0") as caught:
            self.train(tmp_path, 0, how, steps=1)
        assert ("the model it starts from may be at fault" in str(caught.value)) == (how == "gradient")
        assert f"No state of it is saved in {tmp_path}" in str(caught.value) and not (tmp_path / STATE).exists()

    def test_a_state_that_an_older_version_spoiled_is_refused(self, tmp_path: Path) -> None:
        self.train(tmp_path, 9, "")
        tensors, facts = load_state(tmp_path / STATE)
        save_state(tmp_path / STATE, {k: v * float("nan") for k, v in tensors.items()}, facts)
        with pytest.raises(CheckpointError, match="NaN or infinite weights; delete"):
            self.train(tmp_path, 9, "")

    @pytest.mark.parametrize("what", ["weight", "score_offset"])
    def test_a_broken_model_is_not_saved(self, make_causal, tokenizer, tmp_path: Path, what: str) -> None:
        model = scalar_model_from(make_causal(), seed=2)
        if what == "weight":
            with torch.no_grad():
                model.score.weight[0, 0] = float("inf")
        else:
            model.config.score_offset = float("nan")
        with pytest.raises(TrainingError, match=f"not saved, .*{what} of the trained model is NaN or infinite"):
            save_model(tmp_path / "model", model, tokenizer)
        assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    limit=st.integers(1, 300),
)
def test_micro_batches(lengths: list[int], limit: int) -> None:
    groups = micro_batches(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit
    assert micro_batches(lengths, limit) == groups


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 5), epochs=st.integers(1, 4))
def test_epoch_batch_sees_each_row_once_an_epoch(count: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * count // batch)
    batches = [epoch_batch(count, batch, step, seed, "x") for step in range(steps)]
    assert all(len(rows) == batch for rows in batches)
    flat = [row for rows in batches for row in rows]
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert epoch_batch(count, batch, steps - 1, seed, "x") == batches[-1]  # of the step alone


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 5),
    total=st.integers(1, 40),
)
def test_batches_of_like_length_hold_the_same_rows(lengths: list[int], batch: int, seed: int, total: int) -> None:
    grouped = [length_grouped_batch(lengths, batch, step, total, seed, "x", pool=4) for step in range(total)]
    plain = [epoch_batch(len(lengths), batch, step, seed, "x") for step in range(total)]
    assert all(len(rows) == batch for rows in grouped)
    assert sorted(row for rows in grouped for row in rows) == sorted(row for rows in plain for row in rows)


def test_batches_of_like_length_hold_little_padding() -> None:
    lengths = [1 + row % 40 for row in range(400)]
    padded = sum(
        10 * max(lengths[row] for row in length_grouped_batch(lengths, 10, step, 40, 0, "x")) for step in range(40)
    )
    plain = sum(10 * max(lengths[row] for row in epoch_batch(400, 10, step, 0, "x")) for step in range(40))
    assert sum(lengths) <= padded < 1.2 * sum(lengths) < 1.6 * sum(lengths) < plain


def test_orders_differ_between_epochs_seeds_and_names() -> None:
    orders = {tuple(epoch_batch(20, 20, step, seed, name)) for step in (0, 1) for seed in (0, 1) for name in "ab"}
    assert len(orders) == 8


def test_generators_depend_on_their_keys_alone() -> None:
    draw = lambda *keys: float(torch.rand(1, generator=generator_for(*keys)))  # noqa: E731
    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({draw(0, "a", 1), draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2), draw(0, "a1")}) == 5


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 50, warmup=5) for step in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and factors[5] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[5:])) and 0.1 < factors[-1] < 0.11


def test_matrices_decay_and_vectors_do_not(make_causal) -> None:
    model = make_causal("gpt2")
    matrices, vectors = adamw(model, 1e-3, weight_decay=0.05).param_groups
    assert matrices["weight_decay"] == 0.05 and vectors["weight_decay"] == 0
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_recorder_without_a_folder_writes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder("x", progress=False)
    recorder.track({}, {})
    for step in recorder.steps(3):
        recorder.log({"a": torch.tensor(step * 2.0), "b": 1})
    assert recorder.history == [{"step": s, "a": 2.0 * s, "b": 1.0} for s in range(3)]
    assert not list(tmp_path.iterdir()) and recorder.seconds > 0


def test_seconds_count_the_whole_step_over_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("minirlhf.training.time.monotonic", lambda: clock[0])

    def session(seconds: float, die_at: int | None = None, began: float | None = None) -> Mortal:
        recorder = Mortal("x", tmp_path, save_seconds=0, die_at=die_at, began=began)
        clock[0] += seconds  # encoding, for one
        recorder.track({}, {})
        for _ in recorder.steps(3):
            clock[0] += 1.0
            recorder.log({})
        clock[0] += seconds  # what comes after the loop
        return recorder

    with pytest.raises(Killed):
        session(10.0, die_at=1)
    assert load_state(tmp_path / STATE)[1]["seconds"] == 11.0
    clock[0] += 1000.0  # between two sessions
    last = session(20.0, began=clock[0] - 5.0)
    assert last.seconds == 11.0 + 5.0 + 20.0 + 2.0
    assert last.lap() == last.seconds == 11.0 + 5.0 + 20.0 + 2.0 + 20.0


def test_tensorboard_events_are_written_where_they_are_asked_for(tmp_path, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder("x", tmp_path, progress=False, tensorboard=True)
    recorder.track({}, {})
    for step in recorder.steps(3):
        recorder.log({"x/a": float(step)})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x/a")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'tensorboard is not installed: pip install "minirlhf\[tensorboard\]"'):
        Recorder("x", tensorboard=True)
    plain = Recorder("y", tmp_path / "plain", progress=False)
    plain.track({}, {})
    for _ in plain.steps(1):
        plain.log({"y/a": 0.0})
    assert sorted(file.name for file in plain.folder.iterdir()) == ["metrics.jsonl", "state.safetensors"]


def test_steps_may_be_counted_in_something_else(tmp_path) -> None:
    recorder, played = Recorder("x", progress=False), [0]
    steps = []
    for step in recorder.steps(100, done=lambda: played[0]):
        steps.append(step)
        played[0] += 30
        recorder.log({"x/a": played[0]})
    assert steps == [0, 1, 2, 3] and [row["step"] for row in recorder.history] == steps
