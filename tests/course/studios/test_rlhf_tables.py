"""What Studio 4 rests on: tables answer as models do, and what a token is worth is what the package's functions say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from minirlhf_course.studios import text_probes
from minirlhf_course.studios.credit import gae, rewards, strangers, text_of, weights_of, whitened
from minirlhf_course.studios.dictation import score_of, watch
from minirlhf_course.studios.equation2 import BASE
from minirlhf_course.studios.given import brought, run, token_logits, token_values
from minirlhf_course.studios.ledger import parallel
from minirlhf_course.studios.tables import PROMPTS
from minirlhf_course.studios.text_losses import value_errors

from minirlhf.kl import kl_rewards
from minirlhf.language.models import clone, response_logprobs, scalar_model_from
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.tokenization import decode
from minirlhf.losses import value_loss
from minirlhf.returns import gae as package_gae
from minirlhf.returns import whiten
from minirlhf.training import Recorder

close = torch.testing.assert_close


def one_step(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
    """Plain policy gradient with the scores, so that there is something to watch."""
    optimizer = torch.optim.SGD([*policy.parameters(), *value_model.parameters()], lr=0.1)
    for texts in batches:
        samples = sample(policy, texts)
        reward(texts, ["yes"] * len(texts))
        logprobs = response_logprobs(
            policy, samples.tokens, samples.mask, samples.response_mask, temperature=config.temperature
        )
        optimizer.zero_grad()
        (-logprobs.sum() + token_values(value_model, samples.tokens, samples.mask).sum()).backward()
        optimizer.step()


@pytest.fixture
def seen():
    found = watch(one_step, BASE)
    assert not found.problem
    step = found.steps[0]
    return found, step, text_of(found, step, step.updates[0], BASE, 0.3)


def test_tables_answer_as_models_do(seen):
    found, step, text = seen
    samples, models = step.samples, found.models
    models.policy.head.weight.data.copy_(step.updates[0].weights["policy"])  # as they were when it sampled
    T = samples.response_mask.shape[1]
    logprobs = response_logprobs(
        models.policy, samples.tokens, samples.mask, samples.response_mask, temperature=BASE.temperature
    )
    close(logprobs, samples.logprobs)
    by_hand = (token_logits(models.policy, samples.tokens, samples.mask) / BASE.temperature).log_softmax(-1)
    by_hand = by_hand[:, -T - 1 : -1].gather(-1, samples.response_tokens.unsqueeze(-1)).squeeze(-1)
    close(by_hand[samples.response_mask], samples.logprobs[samples.response_mask])
    assert not samples.response_mask.all() and not samples.prompt_mask.all(), "there is padding on both sides"
    assert len({tuple(row) for row in text.rows.tolist()}) == len(PROMPTS), "every prompt has rows of its own"


def test_rewards_and_advantages_are_the_packages(seen):
    _, step, text = seen
    ref = torch.zeros_like(text.d)
    close(rewards(text), kl_rewards(text.score, text.d, ref, text.mask, 0.3))
    advantages, _ = package_gae(rewards(text), text.v, text.last, gamma=text.gamma, lam=text.lam, mask=text.mask)
    close(gae(text), advantages)
    close(whitened(text.mask, advantages), whiten(advantages, text.mask), rtol=1e-6, atol=1e-6)
    cut = ~step.samples.ended
    assert bool(cut.any()) and bool((~cut).any())
    close(text.raw - text.score, BASE.missing_eos_penalty * cut.double())


def test_value_errors_are_the_slope_of_the_packages_loss(seen):
    _, _, text = seen
    v = (text.v + torch.linspace(-1, 1, text.v.numel(), dtype=torch.float64).view_as(text.v)).requires_grad_(True)
    returns = gae(text) + text.v
    loss = value_loss(v, returns, text.mask, old_values=text.v, clip_range=0.2, denominator=1)
    (slope,) = torch.autograd.grad(loss, v)
    errors = value_errors(v.detach(), text.v, returns, text.mask, 0.2)
    close(errors, slope)
    assert bool((errors[text.mask] == 0).any()) and bool((errors[text.mask] != 0).any())


def test_a_gradient_tells_the_weight_of_every_token(seen):
    _, step, text = seen
    update = step.updates[0]
    assert parallel(weights_of(update, text, BASE.temperature), text.mask.double())
    assert not len(strangers(update.gradients["policy"], text))
    assert len(strangers(update.gradients["value"], text)), "values of prompts were in that loss"


def test_answers_and_scores_depend_on_the_seed_alone():
    first, again, other = (watch(one_step, BASE, seed=seed).steps[1].samples for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.response_tokens[:, :1], other.response_tokens[:, :1])
    assert score_of("why", "no") == score_of("why", "no") != score_of("how", "no")


def test_garbage_is_in_padding_and_nowhere_else():
    clean, garbage = (watch(one_step, BASE, garbage=flag).steps[0].samples for flag in (False, True))
    for x, y, mask in (
        (clean.tokens, garbage.tokens, clean.mask),
        (clean.logprobs, garbage.logprobs, clean.response_mask),
    ):
        assert torch.equal(x[mask], y[mask]) and not (x[~mask] == y[~mask]).all()


def test_trainers_that_stop_early_or_raise_are_told():
    def sleeps(policy, *args, sample, **more):
        sample(policy, list(PROMPTS))

    def raises(policy, *args, **more):
        return [][1]

    def sleepwalks(policy, value_model, reference, *args, sample, **more):
        sample(reference, list(PROMPTS))

    assert "No optimizer" in watch(sleeps, BASE).problem
    assert "IndexError" in watch(raises, BASE).problem
    assert "another model than the policy" in watch(sleepwalks, BASE).problem
    assert (
        "samples 1 times"
        in watch(lambda *args, **more: one_step(*args[:5], args[5][:1], args[6], **more), BASE).problem
    )


def test_a_run_on_models_begins_with_the_packages_answers():
    config = replace(text_probes.CONFIG, steps=1, lr=0.0, value_lr=0.0)
    reference = text_probes.fresh(0)
    heard = []

    def reward(prompts, responses):
        heard.append(list(zip(prompts, responses, strict=True)))
        return [0.0] * len(prompts)

    def asks(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
        for texts in batches:
            reward(texts, decode(tokenizer, sample(policy, texts).responses()))

    value = scalar_model_from(reference, 0).eval()
    models = (clone(reference), value, reference, reward, text_probes.tokenizer(), text_probes.PROMPTS, config)
    run(asks, *models, seed=3)
    train_rlhf(*models, seed=3, recorder=Recorder("rlhf", progress=False))
    assert heard[0] == heard[1]


def test_a_trainer_brought_to_a_lesson_is_measured_as_the_package_is(capsys):
    config = replace(text_probes.CONFIG, steps=2, batch_size=4, minibatch_size=4)
    reference = text_probes.fresh(0)

    def models():
        value = scalar_model_from(reference, 0).eval()
        return clone(reference), value, reference, lambda x, y: [0.0] * len(x), text_probes.tokenizer()

    def watch(prompts, responses, ended):
        assert len(prompts) == len(responses) == len(ended) == 4
        return {"words": sum(len(text.split()) for text in responses) / 4}

    def learns_nothing(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, **more):
        return [{"score": sum(reward(texts, sample(policy, texts).lengths))} for texts in batches]

    log = brought(learns_nothing, *models(), text_probes.PROMPTS, config, seed=3, monitor=watch)
    assert [row["score"] for row in log] == [0.0, 0.0]
    recorder = Recorder("rlhf", progress=False)
    frozen = replace(config, lr=0.0, value_lr=0.0)
    train_rlhf(*models(), text_probes.PROMPTS, frozen, seed=3, recorder=recorder, monitor=watch)
    assert [row["words"] for row in log] == [row["words"] for row in recorder.history], "the same answers"
    assert "not attempted" not in capsys.readouterr().out

    def my_rlhf(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
        """The stub."""
        ...  # your code here

    assert brought(my_rlhf, *models(), text_probes.PROMPTS, config, monitor=watch) is None
    assert "my_rlhf: not attempted" in capsys.readouterr().out
