"""How much memory training takes, by a model's shape. ``python -m minirlhf.memory`` prints the table of docs/memory.md.

PPO has four models of P weights each in memory at once; other steps have fewer:

    trained in full     16 P bytes   weights, gradients and Adam's two moments in float32
    not trained         4 P or 2 P   weights in float32 or bfloat16
    on one body         the body once, 4 P or 2 P, and for each model an adapter (16 bytes a weight of it if trained)

To that come, one after the other, the KV cache of the answers that are sampled at a time, and the activations and
logits of one micro-batch of the update. What is counted is what PyTorch allocates; a process has a few hundred MiB of
its own. `minirlhf.pipeline.estimate` asks this module for every step of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

LOGITS_AT_ONCE = 2**22
"""As in `minirlhf.language.models`, which needs torch: where layers are recomputed, logits are too, so many at once."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder.

    Example:
        >>> round(Shape(layers=24, width=896, intermediate=4864, vocabulary=151_936, key_value_width=128).weights / 1e6)
        494
    """

    layers: int
    """Blocks."""
    width: int
    """D, the hidden size."""
    intermediate: int
    """F, the width of the feed-forward layer."""
    vocabulary: int
    """V."""
    key_value_width: int | None = None
    """Heads of keys x their size; None: as wide as the model."""
    tied: bool = True
    """Whether the head is the embedding."""

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.width if self.key_value_width is None else self.key_value_width

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Rows and columns of the matrices of one block."""
        d, f, k = self.width, self.intermediate, self.keys
        return [(d, d), (d, k), (d, k), (d, d), (d, f), (d, f), (f, d)]

    @property
    def body(self) -> int:
        """Weights of embedding and blocks."""
        return self.vocabulary * self.width + self.layers * sum(a * b for a, b in self.matrices) + self._norms

    @property
    def _norms(self) -> int:
        return (2 * self.layers + 1) * self.width

    @property
    def weights(self) -> int:
        """Weights of the causal model."""
        return self.body + (0 if self.tied else self.vocabulary * self.width)

    def adapter(self, rank: int) -> int:
        """Weights of one LoRA adapter on all matrices of the blocks."""
        return self.layers * sum(rank * (a + b) for a, b in self.matrices)


class Models(NamedTuple):
    """How many models there are of each kind."""

    causal: int = 0
    scalar: int = 0
    """Value networks and reward models: a body and a head of one number."""

    def weights(self, shape: Shape) -> int:
        """Of all together."""
        return self.causal * shape.weights + self.scalar * (shape.body + shape.width)


ONE_EACH = Models(1, 1)
"""PPO's policy and value network, and also its reference and reward model."""


def ppo_step(
    shape: Shape,
    *,
    rank: int | None = None,
    precision: str = "float32",
    checkpointing: bool = False,
    rows: int = 16,
    prompt: int = 64,
    answer: int = 64,
) -> dict[str, int]:
    """Bytes that the backward pass of a PPO micro-batch holds, from the second of a step on, by what they are for.

    Args:
        shape: of the four models.
        rank: of the adapters; None for full fine-tuning.
        precision: float32 or bfloat16, as ``--precision``.
        checkpointing: as ``--gradient-checkpointing``.
        rows: answers in the micro-batch.
        prompt: tokens of a prompt.
        answer: tokens of an answer.

    Returns:
        weights, gradients, moments, activations and logits.

    Example:
        >>> shape = Shape(layers=6, width=512, intermediate=1408, vocabulary=32000)
        >>> full, small = ppo_step(shape), ppo_step(shape, rank=4, precision="bfloat16", checkpointing=True)
        >>> sum(small.values()) < sum(full.values()) / 3
        True
    """
    options: Any = {"rank": rank, "precision": precision, "checkpointing": checkpointing}
    return update(shape, ONE_EACH, ONE_EACH, tokens=rows * (prompt + answer), targets=rows * answer, **options)


def update(
    shape: Shape,
    trained: Models,
    frozen: Models,
    *,
    rank: int | None = None,
    precision: str = "float32",
    checkpointing: bool = False,
    tokens: int,
    targets: int,
) -> dict[str, int]:
    """Bytes that the backward pass of a micro-batch holds, by what they are for: `ppo_step` for any step.

    Args:
        shape: of the models.
        trained: those whose losses go through backward.
        frozen: those that are in memory too.
        rank: of the adapters; None for full fine-tuning.
        precision: float32 or bfloat16, as ``--precision``.
        checkpointing: as ``--gradient-checkpointing``.
        tokens: of the micro-batch.
        targets: those of them whose log-probs are computed.

    Example:
        >>> shape = Shape(layers=6, width=512, intermediate=1408, vocabulary=32000)
        >>> update(shape, Models(scalar=1), Models(causal=1), tokens=4096, targets=0)["logits"]
        0
    """
    low = _bytes_computed(precision)
    held = _models(shape, rank, low, trained, frozen)
    if rank is None and low == 2 and not checkpointing:
        held["weights"] += low * trained.weights(shape)  # autocast's copies, kept for backward
    logits = _logits(shape, low, checkpointing, targets) if trained.causal else 0
    kept, layer = _activations(shape, rank, low, checkpointing, tokens, sum(trained))
    if checkpointing:  # a layer is computed again when the logits are gone
        layer = max(0, layer - logits)
    return held | {"activations": kept + layer, "logits": logits}


def sampling(
    shape: Shape,
    *,
    rank: int | None = None,
    precision: str = "float32",
    rows: int = 16,
    prompt: int = 64,
    answer: int = 64,
    trained: Models = ONE_EACH,
    frozen: Models = ONE_EACH,
) -> dict[str, int]:
    """Bytes that sampling some answers holds at most, from the second step on.

    Args:
        shape: of the four models.
        rank: of the adapters; None for full fine-tuning.
        precision: float32 or bfloat16, as ``--precision``.
        rows: answers at a time: ``--rlhf.batch-size``, or as many as fit into ``--rlhf.cache-tokens``.
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        trained: the models that training has in memory; PPO's by default.
        frozen: those that are in memory too.

    Returns:
        weights, gradients, moments, cache, and what is computed beside it: a forward over the prompts, or a draw.

    Example:
        >>> parts = sampling(Shape(layers=32, width=4096, intermediate=11008, vocabulary=32000), precision="bfloat16")
        >>> round(parts["cache"] / (16 * (64 + 64)))  # bytes per token
        786432
    """
    low = _bytes_computed(precision)
    held = _models(shape, rank, low, trained, frozen)
    keys, forward = low, rows * prompt * (16 * shape.intermediate + 12 * shape.width)
    if rank is None and low == 2:  # under autocast
        keys = 4  # the rotation's sines are float32
        forward += low * shape.layers * sum(a * b for a, b in shape.matrices)  # copies of the weights
    draw = rows * shape.vocabulary * (3 * 4 + 8 + 4)  # logits, at the temperature, probabilities; their sums in float64
    cache = shape.layers * shape.keys * (keys + low) * rows * (prompt + answer)
    return held | {"cache": cache, "computed": max(forward, draw)}


def _bytes_computed(precision: str) -> int:
    """Of a number that a model computes."""
    return 2 if precision == "bfloat16" else 4


def _models(shape: Shape, rank: int | None, low: int, trained: Models, frozen: Models) -> dict[str, int]:
    """What the models hold all the time."""
    if rank is None:
        learning = trained.weights(shape)
        weights = 4 * learning + low * frozen.weights(shape)
    else:
        learning = sum(trained) * shape.adapter(rank)
        weights = 4 * learning + low * shape.weights + 4 * sum(frozen) * (shape.adapter(rank) + shape.width)
    return {"weights": weights, "gradients": 4 * learning, "moments": 8 * learning}


def _activations(
    shape: Shape, rank: int | None, low: int, checkpointing: bool, tokens: int, trained: int
) -> tuple[int, int]:
    """Of the models that are trained, whose losses go through backward together: all that is kept, and a layer."""
    d, f, k = shape.width, shape.intermediate, shape.keys
    residual = 4 if rank is None else low  # under autocast the sums stay in float32
    norms = 2 * (4 + residual) * d  # each keeps its input in float32, and its output before the scale
    inputs = low * (2 * d + d + f)  # of the matrices: two norms' outputs, the attention's, the product's
    if rank is not None and low == 2:
        inputs = 4 * (3 * d + d + 2 * d + f)  # a frozen matrix keeps none; each adapter keeps its own in float32
    between = low * (2 * d + 2 * k + 3 * f)  # queries, keys, values, attention; gate, its activation, up
    layer = norms + inputs + between
    flowing = 2 * 4 * f  # gradients on their way through the widest part of a layer
    if checkpointing:  # the inputs of all layers of each, and one layer that is computed again
        return tokens * trained * shape.layers * residual * d, tokens * (layer + flowing)
    return tokens * trained * shape.layers * layer, tokens * flowing


def _logits(shape: Shape, low: int, checkpointing: bool, targets: int) -> int:
    """The logits; their log-softmax, its gradient and the logits' gradient in float32.

    A few at a time they are computed with their entropy and in float32, from a float32 copy of the head.
    """
    if checkpointing:
        targets = min(targets, max(1, LOGITS_AT_ONCE // shape.vocabulary))
        return targets * shape.vocabulary * 6 * 4 + (4 * shape.vocabulary * shape.width if low == 2 else 0)
    return targets * shape.vocabulary * (low + 3 * 4)


class Line(NamedTuple):
    """A model of the table."""

    name: str
    shape: Shape


MODELS = (
    Line("0.1 B", Shape(12, 768, 2048, 32_000)),
    Line("0.5 B", Shape(24, 896, 4864, 151_936, 128)),
    Line("1.5 B", Shape(28, 1536, 8960, 151_936, 256)),
    Line("7 B", Shape(32, 4096, 11008, 32_000, tied=False)),
)
"""The shapes of a Llama as small as GPT-2, of Qwen2.5 0.5 B and 1.5 B, and of Llama 2 7 B."""
SETTINGS: dict[str, dict[str, object]] = {
    "full, float32": {},
    "full, bfloat16, checkpointing": {"precision": "bfloat16", "checkpointing": True},
    "LoRA, float32": {"rank": 16},
    "LoRA, bfloat16": {"rank": 16, "precision": "bfloat16"},
    "LoRA, bfloat16, checkpointing": {"rank": 16, "precision": "bfloat16", "checkpointing": True},
}


def mebibytes(count: float) -> float:
    """Bytes in MiB."""
    return count / 2**20


def table(rows: int = 16, prompt: int = 128, answer: int = 128, cache_tokens: int = 32_768) -> str:
    """The table of docs/memory.md: GiB of the update and of sampling, and bytes per parameter of the models alone."""
    lines = ["| | " + " | ".join(model.name for model in MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for name, options in SETTINGS.items():
        cells = []
        for _, shape in MODELS:
            given: dict[str, Any] = {"prompt": prompt, "answer": answer, **options}
            parts = ppo_step(shape, rows=rows, **given)
            fixed = parts["weights"] + parts["gradients"] + parts["moments"]
            given.pop("checkpointing", None)
            sampled = sum(sampling(shape, rows=cache_tokens // (prompt + answer), **given).values())
            update = sum(parts.values())
            cells.append(f"{update / 2**30:.1f} / {sampled / 2**30:.1f} ({fixed / shape.weights:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
