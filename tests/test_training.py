"""Kill and resume gives the same bits; batches are what they say; a NaN never reaches the weights."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.checkpoints import STATE, load_state, save_model, save_state, verify_model, write_text
from minirlhf.data import Comparison, Demonstration
from minirlhf.errors import CheckpointError, TrainingError, UserError
from minirlhf.language.models import scalar_model_from
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
BATCHES = {"base": "blocks [", "sft": "demonstrations [", "reward_model": "comparisons [", "rlhf": "rows ["}


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


@pytest.fixture
def train(make_causal, tokenizer):
    """Five steps of any learner: ``train("sft", recorder, "gpt2")``."""
    blocks = torch.randint(2, len(tokenizer), (10, 12), generator=generator_for(0))

    def call(name: str, recorder: Recorder, architecture: str = "llama", make=make_causal):
        model, batches = make(architecture), {"batch_size": 4, "warmup": 1}
        if name == "base":
            return train_base(model, blocks, PretrainingConfig(steps=5, **batches), recorder=recorder)
        if name == "sft":
            config = SFTConfig(epochs=2.5, **batches)
            return train_sft(model, tokenizer, DEMONSTRATIONS, config, recorder=recorder)
        if name == "reward_model":
            config = RewardModelConfig(epochs=2.5, **batches)
            more = {"demonstrations": DEMONSTRATIONS, "seed": 3, "recorder": recorder}
            return train_reward_model(model, tokenizer, COMPARISONS, config, **more)
        special = {"target_kl": 0.5, "kl_horizon": 40.0, "ema_decay": 0.5, "ptx_coef": 0.3, "ptx_batch_size": 3}
        config = RLHFConfig(steps=5, batch_size=8, minibatch_size=4, max_response_tokens=6, warmup=1, **special)
        return train_rlhf(
            model,
            scalar_model_from(model, seed=2),
            make(architecture),
            lambda prompts, responses: [len(text) / 10 for text in responses],
            tokenizer,
            [row.prompt for row in DEMONSTRATIONS],
            config,
            corpus_blocks=blocks,
            recorder=recorder,
        )

    return call


def rows(history: list[dict]) -> list[dict]:
    """Metrics without those of the clock."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in history]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", BATCHES)
def test_kill_and_resume_gives_the_same_bits(train, tmp_path: Path, name: str, architecture: str) -> None:
    torch.manual_seed(11)
    whole = Mortal(name, tmp_path / "whole", save_seconds=0)
    expected = train(name, whole, architecture)
    assert len(whole.history) == 5

    # Die twice: after step 1 was computed but not saved, and again two steps later.
    torch.manual_seed(12)
    cut = tmp_path / "cut"
    for die_at in (1, 3):
        with pytest.raises(Killed):
            train(name, Mortal(name, cut, save_seconds=0, die_at=die_at), architecture)
        assert len((cut / "metrics.jsonl").read_text().splitlines()) == die_at + 1
        assert load_state(cut / STATE)[1]["step"] == die_at
    last = Mortal(name, cut, save_seconds=0)
    resumed = train(name, last, architecture)
    assert last.first_step == 3

    for key, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    on_disk = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert rows(on_disk) == rows(last.history) == rows(whole.history)
    if name == "reward_model":
        assert resumed.config.score_offset == expected.config.score_offset
    if name == "rlhf":
        tensors, facts = load_state(cut / STATE)
        assert facts["extras"] == load_state(tmp_path / "whole" / STATE)[1]["extras"]
        assert facts["extras"]["kl"]["beta"] != RLHFConfig().beta
        assert {key.split("/")[1] for key in tensors if key.startswith("model/")} == {"policy", "value", "average"}


def test_a_finished_state_is_not_trained_again(train, tmp_path: Path) -> None:
    first, again = Mortal("sft", tmp_path, save_seconds=1e9), Mortal("sft", tmp_path, die_at=0)
    expected, model = train("sft", first), train("sft", again)
    assert again.first_step == 5 and rows(again.history) == rows(first.history)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_kill_before_the_first_save_begins_anew(train, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train("sft", Mortal("sft", tmp_path, save_seconds=1e9, die_at=2))
    assert not (tmp_path / STATE).exists()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "sft/lo')  # a line cut by the kill
    last = Mortal("sft", tmp_path)
    train("sft", last)
    assert last.first_step == 0 and [row["step"] for row in last.history] == [0, 1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def flipped(payload: bytes, place: int) -> bytes:
    changed = bytearray(payload)
    changed[place] ^= 1
    return bytes(changed)


class TestDamagedState:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """The state of a training that can be taken up again."""
        model = torch.nn.Linear(40, 30)
        recorder = Recorder("x", tmp_path, progress=False)
        recorder.track({"m": model}, {"m": adamw(model, 1e-3)})
        for _ in recorder.steps(1):
            recorder.log({"x/a": 0.0})
        self.load(tmp_path)
        return tmp_path / STATE

    def load(self, folder: Path, outputs: int = 30) -> None:
        model = torch.nn.Linear(40, outputs)
        Recorder("x", folder, progress=False).track({"m": model}, {"m": adamw(model, 1e-3)})

    @pytest.mark.parametrize(
        "damage",
        [
            lambda payload: b"",
            lambda payload: b"not a checkpoint",
            lambda payload: payload[: len(payload) // 2],
            lambda payload: flipped(payload, 3),  # the header
            lambda payload: flipped(payload, -100),  # a weight
            lambda payload: payload.replace(b'\\"step\\": 1', b'\\"step\\": 0'),
        ],
    )
    def test_is_named(self, file: Path, damage) -> None:
        payload = file.read_bytes()
        file.write_bytes(damage(payload))
        assert file.read_bytes() != payload
        with pytest.raises(CheckpointError, match=r"damaged .*; delete") as caught:
            self.load(file.parent)
        assert str(file) in str(caught.value)

    def test_of_another_model(self, file: Path) -> None:
        with pytest.raises(CheckpointError, match="another model") as caught:
            self.load(file.parent, outputs=31)
        assert str(file) in str(caught.value)

    def test_no_pickle_and_nothing_left_beside_it(self, file: Path) -> None:
        tensors, facts = load_state(file)
        save_state(file, tensors, facts)
        assert load_state(file)[1] == facts
        assert {path.name for path in file.parent.iterdir()} == {STATE, "metrics.jsonl"}


class TestSavedModel:
    @pytest.fixture
    def folder(self, make_causal, tokenizer, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        save_model(folder, make_causal(), tokenizer, summary=lambda: {"seconds": 1.0})
        verify_model(folder)
        return folder

    def test_is_whole(self, folder: Path) -> None:
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        assert json.loads((folder / "summary.json").read_text()) == {"seconds": 1.0}

    def test_what_is_planted_in_its_unfinished_folder_is_neither_written_through_nor_kept(
        self, make_causal, tokenizer, tmp_path: Path
    ) -> None:
        outside, given = tmp_path / "outside", tmp_path / "given.aside"
        for aside in (tmp_path / "model.partial", given):  # the usual one, and one that the caller names
            outside.mkdir()
            (outside / "mine").write_text("mine")
            aside.mkdir()
            (aside / "metrics.jsonl").write_text("{}")
            for name in ("model.safetensors", "tokenizer.json", "summary.json", "checksums.json.partial"):
                (aside / name).symlink_to(outside / "mine")
            (aside / "config.json").symlink_to(outside / "new")
            (aside / "folder").symlink_to(outside)
            (aside / "config").mkdir()
            out = tmp_path / "model"
            save_model(out, make_causal(), tokenizer, aside=given if aside == given else None, summary={})
            verify_model(out, required=True)
            assert [file.read_text() for file in outside.iterdir()] == ["mine"]
            assert not any(path.is_symlink() or path.is_dir() for path in out.iterdir())
            assert (out / "metrics.jsonl").exists() == (aside == given)
            shutil.rmtree(out)
            shutil.rmtree(outside)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "summary.json"])
    def test_damage_and_loss_are_named(self, folder: Path, name: str) -> None:
        file = folder / name
        file.write_bytes(flipped(file.read_bytes(), -5))
        with pytest.raises(CheckpointError, match="damaged") as caught:
            verify_model(folder)
        assert str(file) in str(caught.value)
        file.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            verify_model(folder)

    def test_checksums_damaged_and_folder_missing(self, folder: Path) -> None:
        for text in ("{", "null", "[]", "{}", '{"config.json": ""}'):
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


@pytest.mark.parametrize(("name", "batch"), BATCHES.items())
def test_nan_stops_before_the_weights(make_causal, train, tmp_path: Path, name: str, batch: str) -> None:
    models = []

    def make(architecture: str):
        models.append(make_causal(architecture))
        if name != "rlhf" or len(models) == 2:  # a NaN policy can't be sampled from: there the reference is broken
            models[-1].model.norm.weight.data[0] = float("nan")
        return models[-1]

    with pytest.raises(TrainingError, match=f"{name}: the loss is nan at step 0") as caught:
        train(name, Mortal(name, tmp_path), make=make)
    for part in ("lower", str(tmp_path), batch):
        assert part in str(caught.value)
    for key, value in make_causal().state_dict().items():
        same = models[0].state_dict()[key] == value
        assert bool(same.all()) or (key == "model.norm.weight" and int(same.sum()) == len(value) - 1)
    assert not (tmp_path / STATE).exists()


class TestOnlyFiniteStates:
    def train(self, folder: Path, at: int, how: str, steps: int = 4) -> None:
        model = torch.nn.ParameterList([torch.ones(3)])
        optimizer = adamw(model, 0.1)
        recorder = Recorder("x", folder, save_seconds=0, progress=False)
        recorder.track({"m": model}, {"m": optimizer})
        for step in recorder.steps(steps):
            optimizer.zero_grad()
            steep = (step, how) == (at, "gradient")  # at 0 the root is finite, and its gradient is not
            loss = (0 * model[0]).sqrt().sum() if steep else model[0].sum()
            recorder.check_finite(loss, f"rows {step}", "lower the rate")
            loss.backward()
            optimizer.step()
            if (step, how) == (at, "weights"):
                model[0].data[1] = float("inf")

    @pytest.mark.parametrize("how", ["gradient", "weights"])
    def test_the_state_that_the_message_names_is_finite(self, tmp_path: Path, how: str) -> None:
        with pytest.raises(TrainingError, match="at step 2, rows 2; lower the rate") as caught:
            self.train(tmp_path, 2, how)
        message = str(caught.value)
        assert f"Delete {tmp_path} to" in message and f"all finite, are in {tmp_path / STATE}" in message
        assert "before step 2" in message and ("gradient's norm is nan" in message or how == "weights")
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
            model.score.weight.data[0, 0] = float("inf")
        else:
            model.config.score_offset = float("nan")
        with pytest.raises(TrainingError, match=f"not saved, .*{what} of the trained model is NaN or infinite"):
            save_model(tmp_path / "model", model, tokenizer)
        assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), limit=st.integers(1, 300))
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
    batches = [length_grouped_batch(lengths, 10, step, 40, 0, "x") for step in range(40)]
    shuffled = [epoch_batch(400, 10, step, 0, "x") for step in range(40)]
    padded, plain = (sum(10 * max(lengths[row] for row in rows) for rows in x) for x in (batches, shuffled))
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


def three_steps(recorder: Recorder) -> Recorder:
    recorder.track({}, {})
    for step in recorder.steps(3):
        recorder.log({"x/a": torch.tensor(step * 2.0), "x/b": 1})
    return recorder


def test_recorder_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = three_steps(Recorder("x", progress=False))
    assert recorder.history == [{"step": s, "x/a": 2.0 * s, "x/b": 1.0} for s in range(3)]
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


def test_a_step_that_goes_on_under_other_versions_says_so_and_records_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def session(machine: dict, die_at: int | None = None) -> Mortal:
        monkeypatch.setattr("minirlhf.training.made_with", lambda: machine)
        recorder = Mortal("x", tmp_path, save_seconds=0, die_at=die_at)
        with contextlib.suppress(Killed):
            three_steps(recorder)
        return recorder

    old, new = {"torch": "2.0.0", "threads": 2}, {"torch": "2.9.0", "threads": 1}
    assert session(old, die_at=1).machines == [old] and session(old, die_at=1).machines == [old]
    assert capsys.readouterr().err == ""
    assert session(new, die_at=2).machines == [old, new]
    said = f"{tmp_path}: begun with torch 2.0.0, threads 2; goes on with torch 2.9.0, threads 1, so its last bits may"
    assert said in capsys.readouterr().err
    assert session(new).machines == [old, new] and capsys.readouterr().err == ""
    assert load_state(tmp_path / STATE)[1]["machines"] == [old, new]


def test_files_are_flushed_where_folders_can_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    real = os.open

    def spy(path: Path, flags: int) -> int:
        opened.append((Path(path).name, flags & os.O_ACCMODE))
        return real(path, flags)

    monkeypatch.setattr("minirlhf.checkpoints.WINDOWS", True)
    monkeypatch.setattr("minirlhf.checkpoints.os.open", spy)
    write_text(tmp_path / "text", "whole")
    monkeypatch.undo()
    assert opened == [("text.partial", os.O_RDWR)]  # Windows flushes no file that is open for reading alone

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # as some network file systems say of a folder

    monkeypatch.setattr("minirlhf.checkpoints.os.fsync", fsync)
    write_text(tmp_path / "text", "again")
    assert (tmp_path / "text").read_text() == "again"


def test_tensorboard_events_are_written_where_they_are_asked_for(tmp_path, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    three_steps(Recorder("x", tmp_path, progress=False, tensorboard=True))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x/a")] == [(0, 0.0), (1, 2.0), (2, 4.0)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'tensorboard is not installed: pip install "minirlhf\[tensorboard\]"'):
        Recorder("x", tensorboard=True)


def test_steps_may_be_counted_in_something_else() -> None:
    recorder = Recorder("x", progress=False)
    for step in recorder.steps(100, done=lambda: 30 * len(recorder.history)):
        recorder.log({"x/a": step})
    assert recorder.history == [{"step": step, "x/a": step} for step in range(4)]
