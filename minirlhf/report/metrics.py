"""The metrics of step 3 that the page shows, and what to look for in each."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    unit: str
    caption: str


METRICS = {
    "objective/score": Metric(
        "Score by the reward model (proxy)",
        "proxy score",
        "What the policy is trained to raise. It should rise, but that alone says nothing about the answers.",
    ),
    "objective/gold": Metric(
        "Gold score of the same answers",
        "gold score",
        "What we want, and what no policy sees. If it falls while the proxy rises, the reward is being exploited.",
    ),
    "objective/kl": Metric(
        "KL to the SFT model",
        "nats per answer",
        "How far the policy has moved from its parent: log-ratio summed over an answer. It grows, then slows.",
    ),
    "policy/clip_fraction": Metric(
        "Clip fraction",
        "share of tokens",
        "Tokens whose update was clipped. Nearly 0 in the default run: one epoch of two minibatches, and in the first "
        "every ratio is 1. With more epochs it rises; above a quarter, the steps are too large.",
    ),
    "policy/approx_kl": Metric(
        "KL of one update (approx_kl)",
        "nats per token",
        "How far a single batch moves the policy. Spikes here come before a collapse.",
    ),
    "value/explained_variance": Metric(
        "Explained variance of the value network",
        "1 = perfect, 0 = a constant",
        "How much of the returns the critic predicts. It should soon rise above zero and stay there.",
    ),
    "objective/entropy": Metric(
        "Entropy",
        "nats per answer",
        "How varied the answers are. A fall is expected; a fall to zero means one answer to all prompts.",
    ),
    "objective/response_length": Metric(
        "Response length",
        "tokens",
        "Longer is not better. A steady rise often means that the reward model likes length.",
    ),
    "objective/ended_fraction": Metric(
        "Answers that ended",
        "share of answers",
        "Answers that ended on their own, before the token limit.",
    ),
    "objective/equal_groups": Metric(
        "Groups of equal answers",
        "share of groups",
        "Prompts whose answers all have the same reward. They teach nothing: there is no better or worse among them.",
    ),
    "dpo/accuracy": Metric(
        "Pairs that DPO orders as the labeler did",
        "share of pairs",
        "By the reward that the policy has by itself: how much likelier it has made an answer. About 0.5 at the start.",
    ),
    "dpo/margin": Metric(
        "Margin between the better and the worse answer",
        "implicit reward",
        "How far apart that reward sets the two answers of a pair, on average.",
    ),
    "dpo/best_logprob": Metric(
        "Log-probability of the best answer",
        "nats per answer",
        "DPO only compares it with that of the worse answers: both may fall, if they fall more.",
    ),
    "objective/beta": Metric(
        "KL coefficient beta",
        "score per nat",
        "The price of a nat of KL. Flat unless it adapts to a target KL.",
    ),
}
