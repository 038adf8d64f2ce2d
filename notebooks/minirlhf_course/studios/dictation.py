"""Runs a learner's RLHF trainer on tables and watches it: its samples, what the reward hears, every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minirlhf.language.generation import Samples
from minirlhf.language.models import pad
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.language.tokenization import encode_prompts
from minirlhf_course.studios.given import Trainer, token_logits
from minirlhf_course.studios.session import Enough, complaint
from minirlhf_course.studios.tables import PROMPTS, Trio, trio


class Update(NamedTuple):
    """One step of an optimizer that has something of a model: "policy", "value" or "reference"."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    """Of all three models, before the step."""


@dataclass
class Step:
    """One batch: what was sampled, what the reward heard and said, the updates made of it."""

    texts: list[str]
    samples: Samples
    heard: list[tuple[str, str]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)

    def of(self, model: str) -> list[Update]:
        return [update for update in self.updates if model in update.gradients]


@dataclass
class Run:
    """A trainer's run; `fault` says why it did not come to its end, in words."""

    models: Trio
    batches: int
    """How many it was given."""
    steps: list[Step] = field(default_factory=list)
    log: Any = None
    fault: str | None = None
    blocks: list[Tensor] = field(default_factory=list)
    moved: bool = False
    """Whether the reference's weights have changed."""

    @property
    def problem(self) -> str:
        """Why there is nothing to look at: what it raised, or a batch that it learned nothing from; else ""."""
        if self.fault:
            return self.fault
        if not any(step.of("policy") for step in self.steps):
            return "No optimizer of torch.optim has taken a step with a gradient of the policy that it was given."
        if len(self.steps) < self.batches:
            return f"It samples {len(self.steps)} times, and was given {self.batches} batches."
        for number, step in enumerate(self.steps, 1):
            if any(not bool(x.isfinite().all()) for update in step.updates for x in update.gradients.values()):
                return f"In batch {number} a gradient is NaN or infinite: look for 0 / 0, or the log of 0."
            if not step.of("policy"):
                return f"In batch {number} no update has a gradient of the policy."
        return ""


def score_of(prompt: str, response: str) -> float:
    """Any number between -2 and 2, always the same one."""
    return crc32(f"{prompt} {response}".encode()) % 4001 / 1000 - 2


Answers = Sequence[Sequence[int]]


def draw(models: Trio, texts: Sequence[str], config: RLHFConfig, generator: torch.Generator) -> Answers:
    """Sampled answers to prompts, up to and including EOS."""
    rows = [list(row) for row in encode_prompts(models.tokenizer, texts)]
    starts = [len(row) for row in rows]
    for _ in range(config.max_response_tokens):
        for row, start in zip(rows, starts, strict=True):
            if len(row) == start or row[-1] != 1:
                tokens = torch.tensor([row])
                with torch.no_grad():
                    logits = token_logits(models.policy, tokens, torch.ones_like(tokens))[0, -1]
                row.append(int(torch.multinomial((logits / config.temperature).softmax(-1), 1, generator=generator)))
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


def samples_of(
    models: Trio, texts: Sequence[str], answers: Answers, temperature: float, garbage: torch.Generator | None = None
) -> Samples:
    """Answers as `Samples`; with a generator, padded slots hold arbitrary tokens and numbers."""
    prompt_tokens, prompt_mask = pad(encode_prompts(models.tokenizer, texts), 0, side="left")
    tokens, mask = pad(answers, 0)
    if garbage is not None:
        for part, real in ((prompt_tokens, prompt_mask), (tokens, mask)):
            words = torch.randint(3, len(models.tokenizer), part.shape, generator=garbage)
            part[~real] = words[~real]
    width = tokens.shape[1]
    both, real = torch.cat([prompt_tokens, tokens], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        logits = token_logits(models.policy, both, real)[:, -width - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(mask, logprobs, 0.0 if garbage is None else 5.0)
    ended = torch.tensor([row[-1] == 1 for row in answers])
    return Samples(prompt_tokens, prompt_mask, tokens, mask, logprobs, ended)


class Dictation:
    """Watches one run; see `watch`."""

    def __init__(self, models: Trio, config: RLHFConfig, answers: Answers | None, seed: int, garbage: bool) -> None:
        self.run = Run(models, config.steps)
        self._config, self._answers = config, answers
        self._random = torch.Generator().manual_seed(seed)
        self._garbage = torch.Generator().manual_seed(seed) if garbage else None
        tables = (models.policy, models.value, models.reference)
        self._names = dict(zip((x.head.weight for x in tables), ("policy", "value", "reference"), strict=True))

    def sample(self, policy: Any, texts: Sequence[str]) -> Samples:
        models, config = self.run.models, self._config
        if policy is not models.policy:
            self.run.fault = "sample() is called with another model than the policy."
            raise Enough
        if len(self.run.steps) == config.steps:
            self.run.fault = f"It samples once more after the {config.steps} batches that it was given."
            raise Enough
        answers = self._answers or draw(models, texts, config, self._random)
        samples = samples_of(models, texts, answers, config.temperature, self._garbage)
        self.run.steps.append(Step(list(texts), samples))
        return samples

    def reward(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = list(zip(prompts, responses, strict=True))
        if self.run.steps:
            self.run.steps[-1].heard += pairs
        return [score_of(*pair) for pair in pairs]

    def corpus(self) -> Iterator[Tensor]:
        """Blocks of words that no prompt begins with."""
        generator = torch.Generator().manual_seed(7)
        while True:
            block = torch.randint(6, len(self.run.models.tokenizer), (3, 5), generator=generator)
            block[:, 0] = 2
            self.run.blocks.append(block)
            yield block

    def on_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = {p: group for group in optimizer.param_groups for p in group["params"] if p in self._names}
        gradients = {
            self._names[p]: (-1 if group.get("maximize") else 1) * p.grad.detach().double()
            for p, group in own.items()
            if p.grad is not None and (bool(p.grad.any()) or self._names[p] == "reference")
        }
        if own and not self.run.steps:
            self.run.fault = "An optimizer takes a step before anything is sampled."
            raise Enough
        if gradients:
            weights = {name: p.detach().double() for p, name in self._names.items()}
            self.run.steps[-1].updates.append(Update(gradients, weights))


def watch(
    trainer: Trainer,
    config: RLHFConfig,
    *,
    models: Trio | None = None,
    answers: Answers | None = None,
    texts: Sequence[str] = PROMPTS,
    seed: int = 0,
    garbage: bool = False,
) -> Run:
    """Run a trainer on tables as a studio calls it, and return what was seen.

    Args:
        trainer: what the learner wrote.
        config: the settings; a batch is `texts`, `config.steps` times.
        models: the tables; drawn if left out.
        answers: what `sample` returns; drawn from the policy if left out.
        texts: the prompts of a batch.
        seed: of what is drawn.
        garbage: whether padded slots hold arbitrary tokens and numbers.
    """
    models = models or trio()
    session = Dictation(models, config, answers, seed, garbage)
    run = session.run
    before = models.reference.head.weight.detach().clone()
    handle = register_optimizer_step_pre_hook(session.on_update)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            run.log = trainer(
                models.policy,
                models.value,
                models.reference,
                session.reward,
                models.tokenizer,
                [list(texts) for _ in range(config.steps)],
                config,
                sample=session.sample,
                corpus=session.corpus() if config.ptx_coef > 0 else None,
                generator=torch.Generator().manual_seed(seed),
            )
        except Enough:
            pass
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            run.fault = complaint(error, trainer)
        finally:
            handle.remove()
    run.moved = not torch.equal(before, models.reference.head.weight)
    return run
