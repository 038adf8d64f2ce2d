"""Lesson 13, DPO: the best policy, the reward that a policy has by itself, the loss of a pair, the whole loop."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from minirlhf import losses
from minirlhf_course.checks import write13
from minirlhf_course.checks.exercise import exercise
from minirlhf_course.checks.mistakes13 import best_cases, best_with, dpo_cases, dpo_with, implicit_cases, implicit_with

# 13.1 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "13.1",
    "the best policy",
    difficulty=2,
    minutes=10,
    task="Few answers, all of them listed, each with its reward: of all policies, which one has the highest "
    "$\\mathbb{E}_{y\\sim\\pi}[r(y)] - \\beta\\,\\mathrm{KL}(\\pi \\| \\pi_\\text{ref})$? Lesson 09 had it for one "
    "token: $\\pi^*(y) = \\pi_\\text{ref}(y)\\,e^{r(y)/\\beta} / Z$, with one $Z$ for each prompt. Write it in logs. "
    "(One case has $r/\\beta = 2000$. What is its exponential?)",
    cases=best_cases,
    suspects={
        "It overflows: exp(r / beta) of a large reward is infinite. Stay with logs, and normalise with log_softmax.": (
            partial(best_with, "overflow")
        ),
        "The reward is multiplied by beta: divide. The smaller beta is, the more a reward weighs.": (
            partial(best_with, "times")
        ),
        "beta is missing: the reward is divided by it.": partial(best_with, "no beta"),
        "The reference is missing: an answer that it hardly gives stays unlikely.": partial(best_with, "no reference"),
        "It isn't normalised: subtract log Z, the logsumexp over each prompt's answers.": partial(best_with, "no Z"),
        "There is one Z for the whole batch: each prompt has its own.": partial(best_with, "Z of the batch"),
        "It is normalised over the prompts: over the answers to each prompt, the last dimension.": (
            partial(best_with, "Z of the column")
        ),
        "log Z is added: subtract it.": partial(best_with, "Z added"),
        "Z is subtracted: subtract its log.": partial(best_with, "Z without the log"),
        "These are probabilities: give their logs.": partial(best_with, "probabilities out"),
        "The reference's probabilities are added to r / beta: its log-probabilities, as they are given.": (
            partial(best_with, "probabilities in")
        ),
        "The sign of the reward is flipped: it makes an answer likelier.": partial(best_with, "minus"),
        "The reference is multiplied by beta, where the reward should be divided by it: that is another policy.": (
            partial(best_with, "beta of the reference")
        ),
        "The reference is divided by beta as well: only the reward is.": partial(best_with, "both divided"),
        "This is the answer with the highest reward alone, as if there were no penalty.": partial(best_with, "greedy"),
    },
    hints=(
        "$\\log \\pi^*(y) = \\log \\pi_\\text{ref}(y) + r(y)/\\beta - \\log Z$, and $\\log Z$ is whatever makes the "
        "probabilities of each row sum to 1.",
        "`(ref_logprobs + rewards / beta).log_softmax(-1)`",
    ),
)
def best_policy(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The log-probabilities of the best policy, [B, N].

    ref_logprobs and rewards [B, N] float64: all N answers to each of B prompts.
    """
    return (ref_logprobs + rewards / beta).log_softmax(-1)


# 13.2 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "13.2",
    "the reward that a policy has by itself",
    difficulty=2,
    minutes=10,
    task="$\\hat r(x, y) = \\beta \\log \\frac{\\pi(y|x)}{\\pi_\\text{ref}(y|x)}$, for a language model. The "
    "log-probability of an answer is the **sum** over its tokens, EOS among them. The rows hold a prompt, an answer "
    "and padding, and only where `answer_mask` is True are they the answer's. The reference is a constant.",
    cases=implicit_cases,
    suspects={
        "The prompt's log-probs are in the sum: the policy didn't say the prompt. Only where answer_mask is True.": (
            partial(implicit_with, "prompt")
        ),
        "The padding is in the sum: only where answer_mask is True.": partial(implicit_with, "padding"),
        "Everything is in the sum, prompt and padding too: only where answer_mask is True.": (
            partial(implicit_with, "everything")
        ),
        "It is the mean over the answer's tokens: the log-probability of an answer is the sum.": (
            partial(implicit_with, "mean")
        ),
        "It is the mean over all columns, prompt and padding among them: the log-probability of an answer is the "
        "sum.": partial(implicit_with, "mean of columns"),
        "The reference is missing: the log-probability alone says what the policy likes to say, not what it has "
        "learned to prefer.": partial(implicit_with, "no reference"),
        "The reference is the policy itself: the reward is always 0. It is the model that training started from.": (
            partial(implicit_with, "moving reference")
        ),
        "The sign is flipped: log-probs of the policy minus those of the reference.": partial(implicit_with, "turned"),
        "The reference is added: a ratio's log is a difference.": partial(implicit_with, "added"),
        "The log-probs are divided by one another: the log of a ratio is a difference of logs.": (
            partial(implicit_with, "quotient")
        ),
        "These are the ratios of single tokens, added up: the log of the answer's ratio is the sum of the logs.": (
            partial(implicit_with, "ratio")
        ),
        "These are differences of probabilities: of log-probabilities.": partial(implicit_with, "probabilities"),
        "It is divided by beta: multiply.": partial(implicit_with, "over beta"),
        "beta is missing: it turns nats into points of reward.": partial(implicit_with, "no beta"),
        "Only the last token counts here: all of the answer's do.": partial(implicit_with, "last token"),
        "The last token, EOS, is left out: that the answer ends here was the policy's choice, too.": (
            partial(implicit_with, "EOS left out")
        ),
        "The first token of the answer is left out.": partial(implicit_with, "first token left out"),
        "The mask is upside down: True is the answer.": partial(implicit_with, "outside"),
        "The answers are added up: one reward for each.": partial(implicit_with, "batch"),
        "One number for each token comes back: add up the answer's.": partial(implicit_with, "each token"),
    },
    hints=(
        "The ratio of the answer's probabilities is a product over its tokens; its log is a sum.",
        "`beta * torch.where(answer_mask, logprobs - ref_logprobs, 0).sum(1)`",
    ),
    leaves=("logprobs",),
)
def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, answer_mask: Tensor, beta: float) -> Tensor:
    """One reward per answer, [B].

    logprobs, ref_logprobs [B, T]: of each token of the row, by the policy and by the reference;
    answer_mask [B, T] bool, True at the answer's tokens.
    """
    return losses.implicit_rewards(logprobs, ref_logprobs, answer_mask, beta)


# 13.3 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "13.3",
    "DPO's loss",
    difficulty=3,
    minutes=15,
    task="Put that reward into lesson 08's pair loss, in the reward model's place:\n\n"
    "$$-\\log\\sigma\\Big(\\beta\\log\\frac{\\pi(y_w|x)}{\\pi_\\text{ref}(y_w|x)} - \\beta\\log\\frac{\\pi(y_l|x)}"
    "{\\pi_\\text{ref}(y_l|x)}\\Big),$$\n\n"
    "the mean over pairs. All four are log-probabilities of whole answers.",
    cases=dpo_cases,
    suspects={
        "Chosen and rejected are swapped: the chosen answer's ratio comes first.": partial(dpo_with, "swapped"),
        "The minus sign is missing: the optimizer minimises.": partial(dpo_with, "sign"),
        "log(sigmoid(x)) is unstable, and so is log(1 + exp(-x)): use torch.nn.functional.logsigmoid.": (
            partial(dpo_with, "unstable")
        ),
        "The reference is missing: then an answer that was likely from the start counts as preferred.": (
            partial(dpo_with, "no reference")
        ),
        "The reference has the wrong sign, or each answer the other one's: chosen - ref_chosen, and rejected - "
        "ref_rejected.": partial(dpo_with, "reference added"),
        "The reference learns here and the policy doesn't: the ratio is policy over reference.": (
            partial(dpo_with, "reference only")
        ),
        "The reference is the policy itself, so every margin is 0: it is the model that training started from.": (
            partial(dpo_with, "moving reference")
        ),
        "These are ratios: the logs of the ratios go into the sigmoid.": partial(dpo_with, "ratios"),
        "beta stands outside of the sigmoid: inside, it turns nats into points of reward.": (
            partial(dpo_with, "beta outside")
        ),
        "beta is missing.": partial(dpo_with, "no beta"),
        "The margin is divided by beta: multiply.": partial(dpo_with, "over beta"),
        "The log is missing: -sigmoid has no gradient where the policy is most wrong.": partial(dpo_with, "no log"),
        "There is no sigmoid: minus the margin has no lower end, and the policy would run away from the reference.": (
            partial(dpo_with, "linear")
        ),
        "This is a hinge: a fine loss (SLiC has it), but sigmoid of the margin is then no probability.": (
            partial(dpo_with, "hinge")
        ),
        "This is IPO's loss, which pulls the margin to 1 / (2 beta): DPO's is -log sigmoid.": partial(dpo_with, "IPO"),
        "Each answer is judged alone, as KTO does: the labeler has compared them, so only the difference counts.": (
            partial(dpo_with, "alone")
        ),
        "The mean is taken before the log: one loss per pair first, then their mean.": partial(dpo_with, "mean first"),
        "Every chosen answer is compared with every rejected one: only with its own, of the same prompt.": (
            partial(dpo_with, "all against all")
        ),
        "No gradient flows into the rejected answers: the policy must make them less likely, too.": (
            partial(dpo_with, "rejected is held")
        ),
        "One loss per pair comes back: take the mean.": partial(dpo_with, "each"),
        "This is the sum: take the mean over pairs.": partial(dpo_with, "sum"),
    },
    hints=(
        "Two rewards, each `beta` times a difference. Then exercise 8.1.",
        "`margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))`, and "
        "`-torch.nn.functional.logsigmoid(margin).mean()`.",
    ),
    leaves=("chosen", "rejected"),
)
def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """The loss of P pairs, a 0-d tensor.

    All [P]: log-probability of the preferred and of the other answer, by the policy and by the reference.
    """
    return dpo_with("", chosen, rejected, ref_chosen, ref_rejected, beta)


fit_preferences = write13.fit_preferences  # 13.4
