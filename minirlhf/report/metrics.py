"""Which metrics of PPO the page shows, and what to see in each."""

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
        "What PPO is paid for. It should rise; that it rises says nothing yet about the answers.",
    ),
    "objective/gold": Metric(
        "Gold score of the same answers",
        "gold score",
        "What we want, and what PPO never sees. If it bends down while the proxy climbs, the reward is exploited.",
    ),
    "objective/kl": Metric(
        "KL to the SFT model",
        "nats per answer",
        "How far the policy has walked from its parent: log-ratio summed over an answer. It grows, then slows.",
    ),
    "policy/clip_fraction": Metric(
        "Clip fraction",
        "share of tokens",
        "Tokens whose update hit the clip. Always 0: the steps are timid. Above a quarter: too large.",
    ),
    "policy/approx_kl": Metric(
        "KL of one update (approx_kl)",
        "nats per token",
        "How far a single batch moves the policy. Spikes here come before a collapse.",
    ),
    "value/explained_variance": Metric(
        "Explained variance of the value network",
        "1 = perfect, 0 = a constant",
        "How much of the returns the critic foresees. It should climb above zero soon and stay there.",
    ),
    "objective/entropy": Metric(
        "Entropy",
        "nats per answer",
        "How varied the answers are. A fall is expected; a fall to nothing means one answer for all.",
    ),
    "objective/response_length": Metric(
        "Response length",
        "tokens",
        "Longer is not better. A steady climb often means that the reward model likes length.",
    ),
    "objective/ended_fraction": Metric(
        "Answers that ended",
        "share of answers",
        "Answers that stopped by themselves, before the limit of tokens.",
    ),
    "objective/beta": Metric(
        "KL coefficient beta",
        "score a nat",
        "The price of a nat of KL. Flat unless a target KL steers it.",
    ),
}
