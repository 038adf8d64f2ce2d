"""The metrics of PPO that the page shows, and what to look for in each."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    unit: str
    caption: str


PPO_METRICS = {
    "objective/score": Metric(
        "Score by the reward model (proxy)",
        "proxy score",
        "What PPO maximizes. It should rise, but that alone says nothing about the answers.",
    ),
    "objective/gold": Metric(
        "Gold score of the same answers",
        "gold score",
        "What we want, and what PPO never sees. If it falls while the proxy rises, the reward is being exploited.",
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
    "objective/beta": Metric(
        "KL coefficient beta",
        "score per nat",
        "The price of a nat of KL. Flat unless it adapts to a target KL.",
    ),
}
