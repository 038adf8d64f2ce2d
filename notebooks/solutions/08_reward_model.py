"""Solutions of lesson 08: each function stands for the stub of its name."""

import torch
import torch.nn.functional as F


def my_pair_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def my_ranking_loss(rewards, scores):
    differences = rewards[:, :, None] - rewards[:, None, :]
    pairs = scores[:, :, None] > scores[:, None, :]  # strictly: ties are out, and each pair is there once
    losses = torch.where(pairs, -F.logsigmoid(differences), 0).sum((1, 2))
    counts = pairs.sum((1, 2))
    return (losses / counts.clamp(min=1)).sum() / (counts > 0).sum()


def my_usable_pairs(tokens, scores):
    better = scores[:, :, None] > scores[:, None, :]
    differ = (tokens[:, :, None] != tokens[:, None, :]).any(-1)  # after the cut, as the model reads them
    return better & differ


def my_last_token_scores(token_values, mask):
    columns = torch.arange(token_values.shape[1])
    last = torch.where(mask, columns, -1).amax(1)  # the largest index that counts, wherever the padding stands
    return token_values.gather(1, last[:, None]).squeeze(1)


def my_noise_ceiling(scores, others):
    first = (scores[:, :, None] - scores[:, None, :]).sign()
    second = (others[:, :, None] - others[:, None, :]).sign()
    agreement = (first * second > 0).sum().double() / (first * second != 0).sum()
    return agreement, (1 + (2 * agreement - 1).clamp(min=0).sqrt()) / 2


def my_score_offset(model, rows, batch_size):
    scores = []  # once, before the loop
    for batch in rows.split(batch_size):
        scores.append(model(batch))
    return torch.cat(scores).mean()
