"""An experiment of lesson 08: a reward model that hears how surprised its own body is by an answer.

    r(x, y) = head(h_last) + f(log p(y_1 | x), log p(y_2 | x, y_1), ...)

A scalar head misses a wrong name in fluent text: the body predicts token t in its last layer at token t - 1, and no
layer is left to compare the prediction with the token that came. Outside the body the comparison is one dot product,
h[t - 1] with the embedding of token t, and a softmax. f is a small network of those log-probabilities, trained with
the rest by the ranking loss.

InstructGPT's reward model has no f. It helps where wrong answers are improbable ones, as in the small world; in other
text probability may say little about quality, and the best that f can learn there is to be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minirlhf.data import Comparison
from minirlhf.language.forward import hidden_states
from minirlhf.language.models import pad, response_logprobs, scalar_model_from
from minirlhf.language.reward_model import RewardModelConfig
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.losses import linear_token_logprobs, ranking_loss
from minirlhf.training import adamw, epoch_batch, learning_rate_factor, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALLEST = 3  # log-probs that enter f one by one
FLOOR = -4.0  # nats: where the second mean stops counting
WIDTH = 32


class Surprise(nn.Module):
    """f: log-probs of an answer's tokens -> one number; 0 before training.

    The three smallest log-probs, their mean, their mean with each cut at -4 nats, and the log of their count go through
    one hidden layer. f bends where more of the same changes nothing: an answer with a wrong name is wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(SMALLEST + 3, WIDTH)
        self.out = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        """logprobs [B, T] of an answer's tokens, mask [B, T] True at them -> [B].

        Example:
            >>> Surprise()(torch.tensor([[-0.5, -3.0]]), torch.tensor([[True, True]])).tolist()
            [0.0]
        """
        logprobs = torch.where(mask, logprobs, 0.0)  # 0 is no surprise
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)
        room = nn.functional.pad(logprobs, (0, max(0, SMALLEST - logprobs.shape[1])))
        parts = [
            room.topk(SMALLEST, dim=1, largest=False).values / 5,
            logprobs.sum(dim=1, keepdim=True) / count,
            logprobs.clamp(min=FLOOR).sum(dim=1, keepdim=True) / count,
            count.log() / 3,
        ]
        return self.out(nn.functional.silu(self.hidden(torch.cat(parts, dim=1)))).squeeze(1)


class SurpriseRewardModel(nn.Module):
    """A scalar model on a copy of a causal model's body, plus f; called with texts it is a reward function.

    Args:
        causal: the SFT model; its output head must be its embedding.
        tokenizer: of that model.
        seed: random seed for the head and f.

    Raises:
        ValueError: the model's head is a matrix of its own.
    """

    def __init__(self, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        if causal.get_output_embeddings().weight is not causal.get_input_embeddings().weight:
            raise ValueError("the model's output head is not its embedding; tie them (tie_word_embeddings=True)")
        super().__init__()
        self.tokenizer = tokenizer
        self.scalar = scalar_model_from(causal, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.surprise = Surprise()

    def forward(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Score each response to its prompt: -> [B]."""
        before = encode_prompts(self.tokenizer, prompts)
        after = encode_responses(self.tokenizer, responses)
        tokens, mask = pad([p + r for p, r in zip(before, after, strict=True)], self.tokenizer.pad_token_id)
        starts = torch.tensor([len(prompt) for prompt in before])[:, None]
        columns = torch.arange(tokens.shape[1])
        answer = mask & (columns >= starts)
        last = columns == mask.sum(dim=1, keepdim=True) - 1
        before_answer = torch.roll(answer, -1, dims=1)  # the token before each of the answer's
        before_answer[:, -1] = False
        states = hidden_states(self.scalar, tokens, mask, before_answer | last)
        is_last = last[before_answer | last]
        logprobs = linear_token_logprobs(states[~is_last], self.scalar.get_input_embeddings().weight, tokens[answer])
        spread = torch.zeros(answer.shape).masked_scatter(answer, logprobs)
        return self.scalar.score(states[is_last]).squeeze(-1) + self.surprise(spread, answer)


def train_with_surprise(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    config: RewardModelConfig,
    seed: int = 0,
) -> SurpriseRewardModel:
    """`train_reward_model` for a model with f: the same batches, loss, optimizer and learning rates."""
    model = SurpriseRewardModel(causal, tokenizer, seed).eval()
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    steps = max(1, round(config.epochs * len(comparisons) / config.batch_size))
    for step in range(steps):
        rows = [comparisons[i] for i in epoch_batch(len(comparisons), config.batch_size, step, seed, "reward_model")]
        flat = model(
            [row.prompt for row in rows for _ in row.responses], [text for row in rows for text in row.responses]
        )
        counts = torch.tensor([len(row.responses) for row in rows])
        valid = torch.arange(int(counts.max())) < counts[:, None]
        rewards = torch.zeros(valid.shape).masked_scatter(valid, flat)
        labels = torch.zeros(valid.shape)
        labels[valid] = torch.tensor([score for row in rows for score in row.scores])
        optimizer.zero_grad()
        ranking_loss(rewards, labels, valid).backward()
        set_learning_rate(optimizer, config.lr * learning_rate_factor(step, steps, config.warmup))
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return model


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> Tensor:
    """The log-probability of each whole answer, EOS included, under a causal model: [B]."""
    pad_id = tokenizer.pad_token_id
    before, _ = pad(encode_prompts(tokenizer, prompts), pad_id, "left")
    after, counts = pad(encode_responses(tokenizer, answers), pad_id)
    tokens = torch.cat((before, after), 1)
    return response_logprobs(model, tokens, tokens != pad_id, counts).sum(1)
