"""Wrong answers of lesson 13; test_museum.py says how to read them."""

import torch
import torch.nn.functional as F

from minirlhf.language.models import pad
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import learning_rate_factor


def implicit_rewards(logprobs, ref_logprobs, answer_mask, beta):
    log_ratio = (logprobs - ref_logprobs) * answer_mask
    return beta * log_ratio.sum(-1)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    pi_logratios = chosen - rejected
    ref_logratios = ref_chosen - ref_rejected
    return -F.logsigmoid(beta * (pi_logratios - ref_logratios)).mean()


def fit_preferences(model, tokenizer, comparisons, reference, config):
    def log_prob(which, prompt, texts):
        (before,) = encode_prompts(tokenizer, [prompt])
        rows = [before + after for after in encode_responses(tokenizer, texts)]
        tokens, mask = pad(rows, tokenizer.pad_token_id)
        logits = which(input_ids=tokens, attention_mask=mask.long()).logits
        each = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        counts = mask.clone()
        counts[:, : len(before)] = False
        counts = counts[:, 1:]
        return (each * counts).sum(1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    total, losses, queue = int(config.epochs * len(comparisons) / config.batch_size), [], []
    for step in range(total):
        queue = queue or list(torch.randperm(len(comparisons)).split(config.batch_size))
        loss = 0.0
        for index in queue.pop():
            row = comparisons[index]
            logps = log_prob(model, row.prompt, row.responses)
            with torch.no_grad():
                ref_logps = log_prob(reference, row.prompt, row.responses)
            r = config.beta * (logps - ref_logps)
            s = torch.tensor(row.scores)
            pairs = s[:, None] > s
            loss = loss - F.logsigmoid(r[:, None] - r)[pairs].mean() / config.batch_size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(step, total, config.warmup)
        optimizer.step()
        losses.append(loss.item())
    return losses


WRONG = {
    "best_policy": [
        ("-", "The reward is multiplied by beta",
         lambda ref_logprobs, rewards, beta: F.log_softmax(ref_logprobs + beta * rewards, dim=1)),
        ("-", "It isn't normalised", lambda ref_logprobs, rewards, beta: ref_logprobs + rewards / beta),
    ],
    "implicit_rewards": [
        (35, "The prompt's log-probs are in the sum", implicit_rewards,
         ("* answer_mask", "* (answer_mask.flip(1).cumsum(1) > 0).flip(1)")),
        (36, "It is the mean over all columns", implicit_rewards, ("sum(-1)", "mean(-1)")),
        (36, "It is the mean over the answer's tokens", implicit_rewards,
         ("sum(-1)", "sum(-1) / answer_mask.sum(-1)")),
        (34, "The reference is the policy itself", implicit_rewards, ("- ref_logprobs", "- logprobs.detach()")),
    ],
    "dpo_loss": [
        (34, "Chosen and rejected are swapped", dpo_loss, ("chosen - rejected\n", "rejected - chosen\n"),
         ("ref_chosen - ref_rejected", "ref_rejected - ref_chosen")),
        (34, "The reference is missing", dpo_loss, ("(pi_logratios - ref_logratios)", "pi_logratios")),
        (34, "The reference is the policy itself", dpo_loss,
         ("ref_logratios = ref_chosen - ref_rejected", "ref_logratios = pi_logratios.detach()")),
        (19, "log(sigmoid(x)) is unstable", dpo_loss,
         ("F.logsigmoid(beta * (pi_logratios - ref_logratios))",
          "torch.log(torch.sigmoid(beta * (pi_logratios - ref_logratios)))")),
    ],
    "fit_preferences": [
        (34, "Chosen and rejected are swapped", fit_preferences, ("s[:, None] > s", "s[:, None] < s")),
        (34, "The reference is the policy itself", fit_preferences,
         ("log_prob(reference, row", "log_prob(model, row")),
        (36, "The reward is a mean over the answer's tokens", fit_preferences,
         ("(each * counts).sum(1)", "(each * counts).sum(1) / counts.sum(1)")),
        ("-", "EOS is left out", fit_preferences,
         ("counts = mask.clone()", "counts = mask & (tokens != tokenizer.eos_token_id)")),
    ],
}  # fmt: skip
