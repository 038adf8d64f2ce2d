"""Exercises whose answer is a whole training loop, marked by what is true of a right one however it is written.

The loop runs on a tiny model while two hooks watch: one on the model's body, for what it reads, and one on every
optimizer of torch.optim, for the gradients and the learning rate of each step. The rows that were read say what the
batch was, so the gradient can be held against the right one at the same weights, and against those of known mistakes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minirlhf_course.checks.exercise import Case, Exercise, Verdict
from minirlhf_course.checks.outcome import Outcome, raised
from minirlhf_course.checks.untouched import is_untouched

__all__ = ["Run", "Step", "TrainerExercise", "trainer_exercise", "watch"]

EXACT = 2e-3
"""How far a gradient or a loss may be off, as a share of the right one: rows may be padded and summed in any way."""
Part = tuple[int, Hashable]
"""One row that a model reads: the number of its example, and which of that example's rows it is."""


@dataclass
class Step:
    """One step of the optimizer: what was read for it, and what it was given."""

    read: list[tuple[int, ...]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    lr: float
    examples: list[int] = field(default_factory=list)
    """The examples that were read, each once: filled in by `_batches`."""


@dataclass
class Run:
    """A trainer's run: the model that it trained, its steps, what it returned, and why it did not end, in words.

    `given` are the arguments, the trained model among them; other models are copies of the case's, too.
    """

    model: Any
    start: Any
    given: tuple[Any, ...]
    steps: list[Step] = field(default_factory=list)
    returned: Any = None
    fault: str = ""

    def at(self, step: Step) -> Any:
        """The model with the weights that it had before a step."""
        self._scratch = getattr(self, "_scratch", None) or copy.deepcopy(self.start)
        self._scratch.load_state_dict(step.weights, strict=False)
        return self._scratch


def watch(trainer: Callable[..., Any], args: tuple[Any, ...], arguments: Sequence[str] = ()) -> Run:
    """Run a trainer on a copy of the model, its first argument. A model with hooks goes through transformers."""
    given = tuple(copy.deepcopy(x) if isinstance(x, nn.Module) else x for x in args)
    run = Run(given[0], args[0], given)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    read: list[tuple[int, ...]] = []

    def on_read(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        tokens = named["input_ids"] if "input_ids" in named else given[0]
        mask = named.get("attention_mask")
        mask = torch.ones_like(tokens) if mask is None else mask
        read.extend(tuple(row[keep.bool()].tolist()) for row, keep in zip(tokens, mask, strict=True))

    def on_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [(names[p], p, group) for group in optimizer.param_groups for p in group["params"] if p in names]
        if own:
            gradients = {name: p.grad.detach().clone() for name, p, _ in own if p.grad is not None}
            weights = {name: p.detach().clone() for p, name in names.items()}
            run.steps.append(Step(list(read), gradients, weights, float(own[0][2]["lr"])))
            read.clear()

    handles = [
        run.model.base_model.register_forward_pre_hook(on_read, with_kwargs=True),
        register_optimizer_step_pre_hook(on_step),
    ]
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            run.returned = trainer(*given)
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            run.fault = raised(error, trainer, arguments)
        finally:
            for handle in handles:
                handle.remove()
    return run


@dataclass(frozen=True, kw_only=True)
class TrainerExercise(Exercise):
    """An exercise whose answer trains its first argument, a model, in place, and returns the loss of every step.

    Its arguments are (model, tokenizer, examples, ..., config). `suspects` are whole trainers; an answer is not held
    against them, they are there for the tests: each must be told its own sentence.

    Args:
        loss: of (mistake, model, tokenizer, examples): what the gradient of a batch is of; "" is the right one.
        reads: how many of the arguments after the examples the loss is given, too.
        mistakes: sentence to the mistake that gives such a gradient.
        rows: the rows that a model reads for one example, by which of them it is; of (tokenizer, example).
        close: what else must be true at the end, of (run, case): what is wrong and what to show of it, or None.
        again: what to say if a row is read more than once in a pass over the examples.
        bound: what the loss at the end of a case named "memorise" may be of the first, at most.
    """

    loss: Callable[..., Tensor]
    mistakes: Mapping[str, str]
    rows: Callable[[Any, Any], Mapping[Hashable, tuple[int, ...]]]
    again: str
    close: Callable[[Run, Case], tuple[str, str] | None] | None = None
    bound: float = 0.5
    reads: int = 0

    def mark(self, answer: object) -> Verdict:
        """The verdict on a trainer, without printing it."""
        answer = answer.answer if isinstance(answer, Verdict) else answer
        if not callable(answer) or is_untouched(answer):
            return super().mark(answer)
        cases, runs = list(self.cases()), []
        for place, case in enumerate(cases):
            runs.append(watch(answer, case.args, self.arguments))
            problem, more = self._look(runs[-1], case)
            if problem:
                if "gradient of step" in problem:  # it has a name if all cases' first steps agree
                    runs += [watch(answer, other.args, self.arguments) for other in cases[place + 1 :]]
                    problem = self._named(cases, runs) or problem
                shown = f"Smallest failing case: {case.name}\n{more}".rstrip()
                return Verdict("failed", f"{problem}\n\n{shown}", self.reference, answer)
        message = f"Right in all {len(cases)} runs on tiny models, step for step; later cells use your trainer."
        return Verdict("passed", message, answer, answer)

    def run(self, function: Callable[..., Any], case: Case) -> Outcome:
        """The first loss that a trainer returns: what a case's `expected` is."""
        run = watch(function, case.args, self.arguments)
        first = _losses(run)[:1]
        return Outcome(fault=run.fault) if run.fault else Outcome(torch.tensor(first[0]) if first else None)

    # What is looked at, in this order -------------------------------------------------------------------------------

    def _look(self, run: Run, case: Case) -> tuple[str, str]:
        """What is wrong with a run, and what to show of it; ("", "") if nothing is."""
        if run.fault:
            return run.fault, ""
        if not run.steps:
            return "No optimizer of torch.optim has taken a step with the model that was given: train it in place.", ""
        config = case.args[-1]
        problem = self._batches(run, case)
        if problem:
            return problem
        for number, step in enumerate(run.steps, 1):
            problem = self._gradient(run, case, number, step)
            if problem:
                return problem
        return (
            _passes(run, len(case.args[2]), config)
            or _rates([step.lr for step in run.steps], config)
            or self._end(run, case)
            or ("", "")
        )

    def _batches(self, run: Run, case: Case) -> tuple[str, str] | None:
        """Finds out which examples each step has read."""
        _, tokenizer, examples, *_ = case.args
        known: dict[tuple[int, ...], Part] = {}
        parts = [self.rows(tokenizer, example) for example in examples]
        for number, rows in enumerate(parts):
            known.update({_bare(ids, tokenizer): (number, which) for which, ids in rows.items()})
        for bare, owner in list(known.items()):  # the last token predicts nothing, so it may be left out
            known.setdefault(bare[:-1], owner)
        for place, step in enumerate(run.steps, 1):
            read: Counter[Part] = Counter()
            for ids in step.read:
                part = known.get(_bare(ids, tokenizer))
                if part is None:
                    more = f"  step {place} reads {_words(tokenizer, ids)!r}"
                    expected = _words(tokenizer, next(iter(parts[0].values())))
                    return "The model reads rows that are not in the data.", f"{more}\n  a row is {expected!r}"
                read[part] += 1
            if not read:
                return "Step of the optimizer without reading anything before it.", f"  step {place}"
            step.examples = sorted({number for number, _ in read})
            whole = {(number, which) for number in step.examples for which in parts[number]}
            if max(read.values()) > 1 or whole != set(read):
                return self.again, f"  step {place} reads {len(step.read)} rows of {len(step.examples)} prompts"
        return None

    def _gradient(self, run: Run, case: Case, number: int, step: Step) -> tuple[str, str] | None:
        got, right = step.gradients, self._right(run, case, step, "")
        frozen = [name for name, x in right.items() if bool(x.any()) and name not in got]
        if frozen:
            return f"{len(frozen)} of {len(right)} weights are not in the optimizer, or have no gradient.", (
                f"  the first of them: {frozen[0]}"
            )
        limit = case.args[-1].max_grad_norm
        clipped = _clipped(right, limit)
        if _off(got, clipped) <= EXACT:
            return None
        more = (
            f"  step {number}: the norm is {_norm(got):.4g}, expected {_norm(clipped):.4g}; "
            f"cosine {_cosine(got, right):.3f}"
        )
        if not all(bool(x.isfinite().all()) for x in got.values()):
            return f"A gradient is NaN or infinite (step {number}): look for 0 / 0, or the log of 0.", more
        if _norm(right) > limit and _off(got, right) <= EXACT:
            return "The gradient is not clipped: clip_grad_norm_ comes between backward() and step().", more
        if _norm(right) > limit and _off(got, {name: x.clamp(-limit, limit) for name, x in right.items()}) <= EXACT:
            return "Each number of the gradient is clipped by itself: clip the norm, which keeps the direction.", more
        if number > 1 and _off(got, _clipped(_plus(run.steps[number - 2].gradients, right), limit)) <= EXACT:
            return "Gradients add up from step to step: optimizer.zero_grad() is missing.", more
        return f"The gradient of step {number} is not right.", more

    def _right(self, run: Run, case: Case, step: Step, mistake: str) -> dict[str, Tensor]:
        """The gradient of a step's batch at the weights that it had."""
        model = run.at(step)
        model.zero_grad()
        with torch.enable_grad():
            self._loss_of(model, case, step.examples, mistake).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def _loss_of(self, model: Any, case: Case, numbers: Sequence[int], mistake: str = "") -> Tensor:
        _, tokenizer, examples, *others = case.args
        return self.loss(mistake, model, tokenizer, [examples[n] for n in numbers], *others[: self.reads])

    def _named(self, cases: Sequence[Case], runs: Sequence[Run]) -> str:
        """The sentence of the mistake whose gradient is that of the first step in every case; "" for none."""
        pairs = [(case, run) for case, run in zip(cases, runs, strict=True) if run.steps]
        for case, run in pairs:
            if self._batches(run, case):
                return ""
        for sentence, mistake in self.mistakes.items():
            for case, run in pairs:
                wrong = _clipped(self._right(run, case, run.steps[0], mistake), case.args[-1].max_grad_norm)
                if _off(run.steps[0].gradients, wrong) > EXACT:
                    break
            else:
                return sentence
        return ""

    def _end(self, run: Run, case: Case) -> tuple[str, str] | None:
        if run.model.training:
            said = "The model is left in train mode: whoever uses it next would get its dropout. End with model.eval()."
            return said, ""
        losses = _losses(run)
        if len(losses) != len(run.steps):
            more = f"  {len(run.steps)} steps, {len(losses)} losses"
            return "It does not return a list with the loss of every step.", more
        for number, (step, given) in enumerate(zip(run.steps, losses, strict=True), 1):
            with torch.no_grad():
                right = float(self._loss_of(run.at(step), case, step.examples))
            if not math.isclose(given, right, rel_tol=EXACT, abs_tol=EXACT):
                more = f"  step {number}: expected {right:.4f}, got {given:.4f}"
                return "The training is right, and the losses that it returns are not.", more
        problem = self.close(run, case) if self.close is not None else None
        if problem or "memorise" not in case.name:
            return problem
        with torch.no_grad():
            left = float(self._loss_of(run.model, case, range(len(case.args[2]))))
        if left <= self.bound * losses[0]:
            return None
        return (
            "It learns too little: look at the optimizer and its learning rate.",
            f"  the loss began at {losses[0]:.2f} and is {left:.2f} after {len(losses)} steps; a right trainer gets "
            f"below {self.bound * losses[0]:.2f}",
        )


def trainer_exercise(number: str, title: str, **about: Any) -> Callable[[Callable[..., Any]], TrainerExercise]:
    """Makes a `TrainerExercise` of the reference that it decorates; the arguments are those of `TrainerExercise`."""
    return lambda reference: TrainerExercise(number, title, reference=reference, **about)


# Passes and rates ----------------------------------------------------------------------------------------------------


def _passes(run: Run, count: int, config: Any) -> tuple[str, str] | None:
    """What is wrong with the batches, in the order in which they came."""
    size, total = config.batch_size, round(config.epochs * count / config.batch_size)
    batches = [step.examples for step in run.steps]
    for number, batch in enumerate(batches, 1):
        if len(batch) != size:
            return "A batch is not of config.batch_size.", f"  step {number} has {len(batch)} examples, not {size}"
    per_pass = count // size
    passes = [batches[at : at + per_pass] for at in range(0, len(batches), per_pass)]
    for number, each in enumerate(passes, 1):
        seen = {example for batch in each for example in batch}
        if len(each) == per_pass and len(seen) < count:
            return "An epoch does not see each example once.", f"  epoch {number} sees {len(seen)} of {count}"
    if len(batches) != total:
        more = f"  {len(batches)} instead of {total}, for {config.epochs:g} epochs over {count} examples"
        return "It makes the wrong number of steps: config.epochs says how often all examples are seen.", more
    if per_pass > 1 and [example for batch in passes[0] for example in batch] == list(range(count)):
        return "The examples come in the order of the data: shuffle them, anew for every epoch.", ""
    if len(passes) > 2 and per_pass > 2 and all(each == passes[0] for each in passes):
        return "Every epoch goes through the examples in the same order: shuffle anew for each.", ""
    return None


def _rates(rates: Sequence[float], config: Any) -> tuple[str, str] | None:
    """What is wrong with the learning rates; they may be off by one step, and end at 0 or at a tenth."""
    total, warmup = len(rates), config.warmup
    if total < 4:
        return None
    got = [rate / config.lr for rate in rates]
    if max(got) - min(got) < 1e-6:
        said = "The learning rate never changes: a linear warm-up, then a cosine. Set it in every step, before step()."
        return said, ""
    for step, factor in enumerate(got):
        near = [_factor(s, total, warmup, end) for s in (step - 1, step, step + 1) for end in (0.0, 0.1)]
        if min(near) - 0.02 <= factor <= max(near) + 0.02:
            continue
        more = f"  step {step + 1} of {total} has {factor:.2f} of config.lr, expected {near[3]:.2f}"
        if step >= warmup:
            return "The learning rate does not fall along a cosine.", more
        if step == 0:
            return "There is no warm-up: the first step's rate is config.lr / config.warmup.", more
        return "The learning rate does not rise in a straight line to config.lr.", more
    return None


def _factor(step: int, total: int, warmup: int, end: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2


# Gradients, by name --------------------------------------------------------------------------------------------------


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in gradients.values()))


def _clipped(gradients: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    scale = min(1.0, limit / max(_norm(gradients), 1e-12))
    return {name: x * scale for name, x in gradients.items()}


def _plus(before: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x + before.get(name, torch.zeros_like(x)) for name, x in gradients.items()}


def _off(got: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """How far a gradient is from the right one, as a share of that one's norm."""
    apart = {name: got.get(name, torch.zeros_like(x)) - x for name, x in right.items()}
    return _norm(apart) / max(_norm(right), 1e-12)


def _cosine(got: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    along = sum(float((got[name] * x).double().sum()) for name, x in right.items() if name in got)
    return along / max(_norm(got) * _norm(right), 1e-12)


# Texts and numbers ---------------------------------------------------------------------------------------------------


def _bare(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """A row without its padding and its EOS."""
    kept = list(ids)
    while kept and kept[-1] in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        kept.pop()
    while kept and kept[0] == tokenizer.pad_token_id:
        kept.pop(0)
    return tuple(kept)


def _words(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def _losses(run: Run) -> list[float]:
    """What a trainer returned, as numbers; empty where it is anything else."""
    try:
        return [float(x) for x in run.returned]
    except (TypeError, ValueError):
        return []
