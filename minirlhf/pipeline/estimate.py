"""Before any training: how much memory a run takes, and about how long. What the machine can't hold is refused.

Memory comes from the formula of `minirlhf.memory`, for the step that needs most. Time comes from a trial: one layer of
the model's width is trained on a micro-batch and samples a token, and the rest is counting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from minirlhf import parallel
from minirlhf.config import SETTINGS, RunConfig
from minirlhf.data import DataFolder
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.models import LOGITS_ARE_DEAR, configuration, count_weights
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.memory import Models, Shape, sampling, update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
SAMPLE = 200
"""Rows whose lengths are measured."""
TRIED = 2048
"""Tokens of a micro-batch, and columns of the head, that are timed at most."""
OPERATIONS = 2e10
"""Of a layer's update that is timed, about: a fraction of a second on a core."""


def models_held(config: RunConfig) -> dict[str, list[str]]:
    """The models in memory while each method of a run trains. A reward that is a function is none."""
    scored = ["policy", "reference", *(["reward model"] if config.reward is None else [])]
    with_value = ["policy", "value network", *scored[1:]]
    held = {"ppo": with_value, "ppo_ptx": with_value, "rloo": scored, "grpo": scored, "dpo": ["policy", "reference"]}
    return {method: held[method] for method in config.methods}


class Size(NamedTuple):
    """Of a run's models and data."""

    shape: Shape
    """Of the models."""
    longest: int
    """Tokens of the longest sequence, with room for a sampled answer."""
    prompt: float
    """Mean tokens of a prompt."""
    answer: float
    """Mean tokens of a demonstration."""
    demonstrations: int
    """How many."""
    comparisons: int
    """How many."""
    heldout_comparisons: int
    """How many."""
    heldout_prompts: int
    """How many."""
    answers: int
    """K of the largest of them."""


class Need(NamedTuple):
    """The memory of a step, in bytes."""

    step: str
    models: int
    """Weights, gradients and Adam's moments."""
    rest: int
    """Activations and logits of a micro-batch, or the cache of the answers that are sampled."""

    @property
    def total(self) -> int:
        """Both."""
        return self.models + self.rest


def shape_of(config: RunConfig, vocabulary: int) -> Shape:
    """The size of a run's models: of the one that is given, or of the one that is trained from scratch."""
    named: str | Path | None = config.pretrained if config.previous is None else config.previous / "sft"
    if named is None:
        size = config.model_size
        return Shape(size.layers, size.hidden_size, size.intermediate_size, vocabulary)
    text, weights = configuration(named).get_text_config(), count_weights(named)
    heads = getattr(text, "num_attention_heads", 1)
    try:
        width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
        keys = (getattr(text, "num_key_value_heads", None) or heads) * (
            getattr(text, "head_dim", None) or width // heads
        )
        tied = bool(text.tie_word_embeddings)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{named}: config.json doesn't say how large the model is ({error})") from None
    # As wide in the middle as makes a Llama of so many weights.
    per_layer = (weights - (1 if tied else 2) * vocabulary * width) / layers - 2 * width * (width + keys)
    return Shape(layers, width, max(1, round(per_layer / (3 * width))), vocabulary, keys, tied)


def size_of(config: RunConfig, folder: DataFolder, tokenizer: PreTrainedTokenizerBase, longest: int) -> Size:
    """Count and measure what a run trains on: the lengths of some rows, and the longest sequence of all."""
    shown, ranked = folder.demonstrations, folder.comparisons
    some = shown[:: max(1, len(shown) // SAMPLE)]
    prompts = encode_prompts(tokenizer, [row.prompt for row in some])
    answers = encode_responses(tokenizer, [row.completion for row in some])
    return Size(
        shape=shape_of(config, len(tokenizer)),
        longest=longest,
        prompt=sum(map(len, prompts)) / len(some),
        answer=sum(map(len, answers)) / len(some),
        demonstrations=len(shown),
        comparisons=len(ranked),
        heldout_comparisons=len(folder.heldout_comparisons),
        heldout_prompts=len(folder.heldout_prompts),
        answers=max(len(row.responses) for row in ranked),
    )


def memory_of(config: RunConfig, size: Size, device: torch.device) -> list[Need]:
    """What each step of a run that is left to do takes at its peak, of one process, in the order of the steps."""
    learners = {step: (Models(1), Models()) for step in ("base", "sft")}
    learners["reward_model"] = Models(0, 1), Models(1)
    for method, held in models_held(config).items():
        learners[method] = Models(1, int("value network" in held)), Models(1, int("reward model" in held))
    learners["evaluation"] = Models(), Models(2 + len(config.methods), int(config.reward is None))
    done = _given(config) | {step for step in learners if (config.out / step).is_dir()}
    return [_need(step, config, size, device, *models) for step, models in learners.items() if step not in done]


def _given(config: RunConfig) -> set[str]:
    """The steps that train nothing, because their models are given."""
    steps = {"base", "sft"} if config.previous is not None else set[str]()
    steps |= {"base"} if config.pretrained is not None else set()
    steps |= {"sft"} if config.given_sft is not None else set()
    return steps | ({"reward_model"} if config.reward is not None or config.given_reward_model is not None else set())


def _need(step: str, config: RunConfig, size: Size, device: torch.device, trained: Models, frozen: Models) -> Need:
    """The larger of a step's phases: an update, and sampling. Each process has its share of a batch."""
    settings, shape, longest = getattr(config, SETTINGS.get(step, step)), size.shape, size.longest
    answered = size.answer / (size.prompt + size.answer)
    computed: Any = {"rank": config.lora.rank, "precision": config.precision}
    updated: Any = computed | {"checkpointing": config.gradient_checkpointing}
    phases = []

    def add(tokens: int, targets: float) -> None:
        on_gpu = device.type in LOGITS_ARE_DEAR  # where logits are never in memory
        phases.append(
            update(shape, trained, frozen, tokens=tokens, targets=0 if on_gpu else math.ceil(targets), **updated)
        )

    if step == "base":
        tokens = _share(settings.batch_size) * settings.block_length
        add(tokens, tokens)
    elif step == "sft":
        tokens = _micro_batch(settings.batch_size, longest, settings.micro_batch_tokens)
        add(tokens, tokens * answered)
    elif step in ("reward_model", "dpo"):  # the answers to a prompt stay together
        tokens = _micro_batch(settings.batch_size, size.answers * longest, settings.micro_batch_tokens)
        add(tokens, tokens * answered)
    elif step != "evaluation":
        tokens = _micro_batch(settings.minibatch_size, longest, settings.micro_batch_tokens)
        add(tokens, max(1, tokens // longest) * settings.max_response_tokens)
        if step != "ppo" and settings.ptx_coef > 0:
            tokens = _micro_batch(settings.ptx_batch_size, config.base.block_length, settings.micro_batch_tokens)
            add(tokens, tokens)
    if (rows := _sampled_at_a_time(step, settings, size)) > 0:
        room = settings.max_response_tokens
        asked = {"rows": rows, "prompt": max(1, longest - room), "answer": room}
        phases.append(sampling(shape, trained=trained, frozen=frozen, **asked, **computed))
    needs = []
    if step == "evaluation":  # two models' logits of 1024 tokens, and what their KL is computed from
        held = sum(phases[0].values()) - phases[0]["cache"] - phases[0]["computed"]
        phases.append({"weights": held, "gradients": 0, "moments": 0, "logits": 6 * 4 * 1024 * shape.vocabulary})
    for parts in phases:
        models = parts["weights"] + parts["gradients"] + parts["moments"]
        needs.append(Need(step, models, sum(parts.values()) - models))
    return max(needs, key=lambda need: need.total)


def _share(rows: int) -> int:
    """Of a batch, for each of several processes."""
    return math.ceil(rows / parallel.size())


def _micro_batch(rows: int, longest: int, most: int) -> int:
    """Tokens of the largest micro-batch: of so many rows, with at most so many tokens unless one row has more."""
    return min(_share(rows) * longest, max(most, longest))


def _sampled_at_a_time(step: str, settings: Any, size: Size) -> int:
    """Answers that a process samples together."""
    if step == "evaluation":
        return max(1, min(settings.prompts, size.heldout_prompts, settings.batch_size))
    if step == "dpo":
        return _share(settings.measured_prompts)
    if not hasattr(settings, "cache_tokens"):
        return 0
    rows, most = _share(settings.batch_size), settings.cache_tokens
    return rows if most is None else min(rows, max(1, most // size.longest))


def apart(config: RunConfig, device: torch.device) -> bool:
    """Whether the methods of a run train two at a time."""
    alone = len(config.methods) == 1 or device.type != "cpu" or parallel.size() > 1
    return config.side_by_side and torch.get_num_threads() > 1 and not alone


def at_most(config: RunConfig, needs: Sequence[Need], device: torch.device) -> Need:
    """The step that takes most, or the two that train at the same time; of all processes on a CPU."""
    together = list(needs)
    methods = [need for need in needs if need.step in config.methods]
    if apart(config, device):
        for one, other in zip(methods[::2], methods[1::2], strict=False):
            names = f"{one.step} beside {other.step}"
            together.append(Need(names, one.models + other.models, one.rest + other.rest))
    size = parallel.size()
    if config.shard:
        together = [Need(step, models // size, rest) for step, models, rest in together]
    if device.type == "cpu":  # whose memory the processes share
        together = [Need(step, models * size, rest * size) for step, models, rest in together]
    return max(together, key=lambda need: need.total)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take: of the GPU, or of the machine or its container; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        found += [1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"]
    for most, used in CGROUPS:
        if Path(most).is_file() and Path(used).is_file() and (limit := Path(most).read_text().strip()) != "max":
            found.append(int(limit) - int(Path(used).read_text()) + _cached(Path(most).parent / "memory.stat"))
    return min(found, default=None)


def _cached(stat: Path) -> int:
    """Bytes of a container's memory that hold files, and are given back when they are needed."""
    lines = (line.split() for line in stat.read_text().splitlines()) if stat.is_file() else ()
    found = {line[0]: int(line[1]) for line in lines}
    return sum(found.get(f"total_{kind}_file", found.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))


def check_memory(config: RunConfig, size: Size, device: torch.device) -> Need:
    """Refuse a run that needs more memory than there is.

    Args:
        config: of the run; ``allow_oversize`` lets it start all the same.
        size: of its models and data.
        device: where it trains.

    Returns:
        The step that needs most.

    Raises:
        UserError: says how much, how much there is, and what would help.
    """
    need = at_most(config, memory_of(config, size, device), device)
    free = free_memory(device)
    if free is None or need.total <= free or config.allow_oversize:
        return need
    ways = ", ".join([*_ways(config, size, need, device), "a smaller model"])
    raise UserError(
        f"{need.step} would take about {_gib(need.total)} of memory ({_gib(need.models)} for the models, "
        f"{_gib(need.rest)} for a micro-batch or the answers that are sampled), and {_gib(free)} are free on {device}; "
        f"try {ways}, or start all the same with --allow-oversize"
    )


def _ways(config: RunConfig, size: Size, need: Need, device: torch.device) -> list[str]:
    """Options that lower it; a round takes its settings from the run before it."""
    if config.previous is not None:
        return []
    group = SETTINGS.get(need.step.split()[0], need.step.split()[0])
    settings = getattr(config, group)
    ways: dict[str, dict[str, Any]] = {
        "--no-side-by-side": {"side_by_side": False},
        "--gradient-checkpointing": {"gradient_checkpointing": True},
    }
    if config.pretrained is not None:
        ways["--precision bfloat16"] = {"precision": "bfloat16"}
        if not config.shard:
            ways["--lora.rank 16"] = {"lora": replace(config.lora, rank=16)}
    sampling_group = hasattr(settings, "cache_tokens")  # whose batch size is a matter of learning
    for name in ("micro_batch_tokens", "cache_tokens" if sampling_group else "batch_size"):
        least = size.longest if name == "cache_tokens" else 1
        if hasattr(settings, name):
            ways[f"a smaller --{group}.{name}".replace("_", "-")] = {group: replace(settings, **{name: least})}
    lower = []
    for way, change in ways.items():
        changed = replace(config, **change)
        if at_most(changed, memory_of(changed, size, device), device).total < need.total:
            lower.append(way)
    return lower


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"


class Work(NamedTuple):
    """What a step computes."""

    trained: float
    """Tokens that go forward and backward, once for each model."""
    seen: float
    """Tokens that only go forward, once for each model."""
    targets: float
    """Those of the first two whose log-probs are computed."""
    drawn: float
    """Tokens that are sampled one after the other; each is a forward of all answers that are sampled at a time."""


def work_of(step: str, config: RunConfig, size: Size) -> Work:
    """What a step of a run computes. Answers are taken to be as long as the demonstrations."""
    settings = getattr(config, SETTINGS.get(step, step))
    if step in _given(config):
        return Work(0, 0, 0, 0)
    if step == "base":
        tokens = settings.steps * settings.batch_size * settings.block_length
        return Work(tokens, 0, tokens, 0)
    if step == "sft":
        rows = settings.epochs * size.demonstrations
        return Work(rows * (size.prompt + size.answer), 0, rows * size.answer, 0)
    room = settings.max_response_tokens if step != "reward_model" else 0
    both = size.prompt + min(size.answer, room)
    if step == "evaluation":
        models, prompts = 2 + len(config.methods), min(settings.prompts, size.heldout_prompts)
        rows = models * prompts
        batches = models * math.ceil(prompts / settings.batch_size)
        ranked = size.heldout_comparisons * size.answers * (size.prompt + size.answer)
        return Work(0, rows * 3 * both + ranked, rows * 2 * room, batches * room)
    if step in ("reward_model", "dpo"):
        rows = settings.epochs * size.comparisons * size.answers
        tokens, answers = rows * (size.prompt + size.answer), rows * size.answer
        if step == "reward_model":  # whose scores of the demonstrations are then shifted to a mean of 0
            return Work(tokens, size.demonstrations * (size.prompt + size.answer), 0, 0)
        times = 1 + math.ceil(settings.epochs * size.comparisons / settings.batch_size / settings.measure_every)
        return Work(tokens, tokens, 2 * answers, times * room if settings.measured_prompts else 0)
    answers = settings.steps * settings.batch_size
    held = models_held(config)[step]
    learners = 1 + ("value network" in held)
    batches = settings.steps * math.ceil(_share(settings.batch_size) / _sampled_at_a_time(step, settings, size))
    trained = answers * settings.epochs * both * learners
    targets = answers * (settings.epochs + 2) * min(size.answer, room)
    if step != "ppo" and settings.ptx_coef > 0:
        updates = settings.steps * settings.epochs * math.ceil(settings.batch_size / settings.minibatch_size)
        text = updates * settings.ptx_batch_size * config.base.block_length
        trained, targets = trained + text, targets + text
    return Work(trained, answers * both * len(held), targets, batches * room)


class Speed(NamedTuple):
    """Seconds of one layer, from a trial."""

    update: float
    """Per token that goes forward and backward."""
    forward: float
    """Per token that only goes forward."""
    draw: float
    """Per token of all answers that are sampled at a time."""
    head: float
    """Per target, forward and backward; of all of the vocabulary."""


def trial(config: RunConfig, size: Size, rows: int, device: torch.device) -> Speed:
    """Time one layer of the models' width on this device, with the threads that it has now.

    Args:
        config: of the run.
        size: of its models and data.
        rows: answers that are sampled at a time.
        device: where the run trains.
    """
    from transformers import LlamaConfig, LlamaModel

    shape = size.shape
    weights = sum(a * b for a, b in shape.matrices)
    heads = max(1, round(shape.width / shape.keys))  # each as wide as all keys, which makes no difference to the work
    while shape.width % heads:
        heads -= 1
    layer = LlamaConfig(
        vocab_size=2,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=shape.keys + shape.keys % 2,  # rotation takes pairs
        bos_token_id=None,
        eos_token_id=None,
    )
    length = min(math.ceil(size.prompt + size.answer), TRIED)
    many = max(1, int(min(TRIED, OPERATIONS / (6 * weights)) / length))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = LlamaModel(layer).train(False)
        text = torch.full((many, length, shape.width), 0.1)
        token = torch.full((max(1, min(rows, int(OPERATIONS / (2 * weights)))), 1, shape.width), 0.1)
        head = torch.full((min(shape.vocabulary, TRIED), shape.width), 0.1, requires_grad=True)

    def forward() -> Any:
        return model(inputs_embeds=text, use_cache=False).last_hidden_state

    def draw() -> None:
        model(inputs_embeds=token, past_key_values=past)

    def score() -> None:
        logits = torch.nn.functional.linear(text[0].detach(), head)
        logits.float().log_softmax(-1).sum().backward()

    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        update = _timed(lambda: forward().float().sum().backward(), device)
        target = _timed(score, device) / length * shape.vocabulary / len(head)
        with torch.no_grad():
            seen = _timed(forward, device)
            past = model(inputs_embeds=token.expand(-1, min(length, 64), -1), use_cache=True).past_key_values
            drawn = _timed(draw, device) * max(1.0, rows / len(token))
    return Speed(update / text[..., 0].numel(), seen / text[..., 0].numel(), drawn, target)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the best of three after a first, or of one where it takes long."""
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        last = time.perf_counter() - began
        best = min(best, last)
        if last > 0.1:
            break
    return best


def seconds_of(config: RunConfig, size: Size, steps: Sequence[str], device: torch.device) -> float:
    """About how long the steps of a run will take here: within a factor of two, say.

    Args:
        config: of the run.
        size: of its models and data.
        steps: those that are left to do, "evaluation" among them.
        device: where it trains.
    """
    threads, paired = torch.get_num_threads(), apart(config, device)

    def one(step: str, speed: Speed) -> float:
        work = work_of(step, config, size)
        layers, again = size.shape.layers, int(config.gradient_checkpointing)
        both = work.trained * (speed.update + again * speed.forward) + work.seen * speed.forward
        rows = _sampled_at_a_time(step, getattr(config, SETTINGS.get(step, step)), size)
        drawn = work.drawn * (layers * speed.draw + rows * speed.head / 3)
        return (layers * both + work.targets * speed.head) / parallel.size() + drawn

    rows = _sampled_at_a_time(config.methods[0], getattr(config, SETTINGS[config.methods[0]]), size)
    whole = trial(config, size, rows, device)
    total = sum(one(step, whole) for step in steps if step not in config.methods)
    methods = [step for step in steps if step in config.methods]
    if not paired:
        return total + sum(one(step, whole) for step in methods)
    torch.set_num_threads(max(1, threads // 2))
    try:
        half = trial(config, size, rows, device)
    finally:
        torch.set_num_threads(threads)
    times = [one(step, half) for step in methods]
    return total + sum(max(times[at : at + 2]) for at in range(0, len(times), 2))


def said(config: RunConfig, size: Size, steps: Sequence[str], device: torch.device) -> str:
    """The estimate in one line."""
    need = at_most(config, memory_of(config, size, device), device)
    seconds = seconds_of(config, size, [*steps, "evaluation"], device)
    return f"estimate: {_gib(need.total)} of memory ({need.step}), {_about(seconds)} left"


def _about(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    one, unit = (60, "min") if seconds < 90 * 60 else (3600, "h") if seconds < 48 * 3600 else (86_400, "days")
    return f"about {seconds / one:.0f} {unit}"
