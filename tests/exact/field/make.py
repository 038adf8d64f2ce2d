"""Write what other projects compute from inputs.json, one JSON file each, for tests/exact/test_field.py.

    python tests/exact/field/make.py PEER VERSION [FOLDER]     PEER: sb3 torchrl trl verl openrlhf cleanrl

sb3 and torchrl must be installed; of the others, FOLDER is the package's folder or a checkout, and the functions are
evaluated from their source, one by one, without what else their modules import. Everything is in float64.
"""

from __future__ import annotations

import ast
import json
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).parent
F64 = torch.float64


def make_inputs() -> dict:
    """Three answers of up to five tokens, and two environments of six steps."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=g)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=F64)
    old = -draw(3, 5).abs() * mask
    text = {"mask": mask, "old_logprobs": old, "logprobs": (old + 0.3 * draw(3, 5) * mask)}
    text |= {"ref_logprobs": old + 0.2 * draw(3, 5) * mask, "rollout_logprobs": old + 0.4 * draw(3, 5) * mask}
    text |= {name: draw(3, 5) * mask for name in ("advantages", "values", "old_values", "returns", "rewards")}
    text |= {"chosen": draw(4), "rejected": draw(4), "logits": 2 * draw(3, 5, 7)}
    text["tokens"] = torch.randint(7, (3, 5), generator=g)
    control = {name: draw(2, 6) for name in ("rewards", "values")} | {"last_values": draw(2)}
    control["dones"] = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1]])
    return {"text": text, "control": control}


def lists(x):
    if isinstance(x, torch.Tensor):
        return x.detach().tolist()
    return {key: lists(value) for key, value in x.items()} if isinstance(x, dict) else x


def source(file: Path, *names: str, **known):
    """Functions and classes of a file, by name, evaluated from their source without their decorators."""
    space = {"torch": torch, "nn": nn, "F": F, "math": math, **known}
    found = {
        node.name: node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for name in names:
        found[name].decorator_list = []
        code = "from __future__ import annotations\n" + ast.unparse(found[name])
        exec(compile(code, f"{file}:{name}", "exec"), space)
    return SimpleNamespace(**space)


def gradient(loss, *variables):
    return [g.tolist() for g in torch.autograd.grad(loss, variables, retain_graph=True)]


def sb3(t, c, _):
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    buffer = RolloutBuffer(
        6, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), device="cpu", gamma=0.97, gae_lambda=0.9, n_envs=2
    )
    dones = c["dones"].numpy().T.astype(float)
    buffer.rewards, buffer.values = c["rewards"].numpy().T.copy(), c["values"].numpy().T.copy()
    buffer.episode_starts = np.concatenate([np.zeros((1, 2)), dones[:-1]])
    buffer.advantages = np.zeros((6, 2))
    buffer.compute_returns_and_advantage(c["last_values"], dones[-1])
    return {"gae": {"advantages": buffer.advantages.T.tolist(), "returns": buffer.returns.T.tolist()}}


def torchrl(t, c, _):
    from torchrl.objectives.value import functional as f

    def step(x):
        return x.unsqueeze(-1)

    value, reward, done = step(c["values"]), step(c["rewards"]), step(c["dones"].bool())
    after = step(torch.cat([c["values"][:, 1:], c["last_values"][:, None]], 1))
    gamma, lam = torch.tensor(0.97, dtype=F64), torch.tensor(0.9, dtype=F64)
    out = {
        "td_lambda": f.td_lambda_return_estimate(gamma, lam, after, reward, done).squeeze(-1),
        "reward_to_go": f.reward2go(reward, done, 0.97).squeeze(-1),
        "td0": f.td0_return_estimate(gamma, after, reward, done).squeeze(-1),
        "gae": f.generalized_advantage_estimate(0.97, 0.9, value, after, reward, done)[0].squeeze(-1),
    }
    return lists(out)


def verl(t, c, folder):
    tf = source(
        folder / "verl/utils/torch_functional.py",
        "masked_sum",
        "masked_mean",
        "masked_var",
        "masked_whiten",
        "clip_by_value",
    )
    names = (
        "compute_gae_advantage_return",
        "agg_loss",
        "kl_penalty",
        "kl_penalty_forward",
        "compute_policy_loss_vanilla",
        "compute_value_loss",
    )
    f = source(folder / "verl/trainer/ppo/core_algos.py", *names, verl_F=tf, AlgoConfig=type("AlgoConfig", (), {}))
    rewards, values, mask = t["rewards"], t["values"], t["mask"]
    white, returns = f.compute_gae_advantage_return(rewards, values, mask, 0.97, 0.9)
    new, vpreds = t["logprobs"].requires_grad_(), t["values"].clone().requires_grad_()
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={}, get=lambda k, d: 1e9
    )
    weights = (t["old_logprobs"] - t["rollout_logprobs"]).exp().clamp(max=1.2)
    plain, seen = f.compute_policy_loss_vanilla(t["old_logprobs"], new, t["advantages"], mask, config=config)
    weighted, _ = f.compute_policy_loss_vanilla(
        t["old_logprobs"], new, t["advantages"], mask, config=config, rollout_is_weights=weights
    )
    loss, _ = f.compute_value_loss(vpreds, t["returns"], t["old_values"], mask, 0.2)
    return {
        "gae": lists({"whitened": white, "returns": returns}),
        "whiten": lists({str(s): tf.masked_whiten(t["advantages"], mask, shift_mean=s) for s in (True, False)}),
        "kl": {k: lists(f.kl_penalty(t["logprobs"], t["ref_logprobs"], k)) for k in ("k1", "k2", "k3")},
        "policy": {
            "loss": plain.item(),
            "gradient": gradient(plain, new)[0],
            "clip_fraction": seen["actor/pg_clipfrac"],
        },
        "weighted": {"loss": weighted.item(), "gradient": gradient(weighted, new)[0]},
        "value": {"loss": loss.item(), "gradient": gradient(loss, vpreds)[0]},
    }


def openrlhf(t, c, folder):
    utils = source(folder / "openrlhf/models/utils.py", "masked_mean", "compute_approx_kl")
    names = ("aggregate_loss", "SFTLoss", "PolicyLoss", "ValueLoss", "PairWiseLoss")
    f = source(folder / "openrlhf/models/loss.py", *names, masked_mean=utils.masked_mean)
    mask, new, vpreds = t["mask"], t["logprobs"].requires_grad_(), t["values"].clone().requires_grad_()
    plain, clipped, kl, _ = f.PolicyLoss()(new, t["old_logprobs"], t["advantages"], mask)
    corrected = f.PolicyLoss(enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.0, 1.2])
    weighted, _, _, apart = corrected(new, t["old_logprobs"], t["advantages"], mask, t["rollout_logprobs"])
    loss = f.ValueLoss(clip_eps=0.2)(vpreds, t["old_values"], t["returns"], mask)
    chosen = t["chosen"].requires_grad_()
    pairs, sft = f.PairWiseLoss()(chosen, t["rejected"]), f.SFTLoss()(new, mask)
    return {
        "kl": {k: lists(utils.compute_approx_kl(t["logprobs"], t["ref_logprobs"], k)) for k in ("k1", "k2", "k3")},
        "policy": {
            "loss": plain.item(),
            "gradient": gradient(plain, new)[0],
            "clip_fraction": clipped.item(),
            "kl": kl.item(),
        },
        "weighted": {"loss": weighted.item(), "gradient": gradient(weighted, new)[0], "kl": apart.item()},
        "value": {"loss": loss.item(), "gradient": gradient(loss, vpreds)[0]},
        "pairs": {"loss": pairs.item(), "gradient": gradient(pairs, chosen)[0]},
        "sft": {"loss": sft.item(), "gradient": gradient(sft, new)[0]},
    }


def cleanrl(t, c, folder):
    lines = (folder / "cleanrl/ppo.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("logratio ="))
    stop = next(i for i, line in enumerate(lines) if line.strip().startswith("loss = pg_loss"))
    flat = {
        k: t[k].flatten().clone() for k in ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    }
    new, value = flat["logprobs"].requires_grad_(), flat["values"].requires_grad_()
    space = {"torch": torch, "clipfracs": [], "mb_inds": torch.arange(15), "newlogprob": new, "newvalue": value}
    space |= {"b_logprobs": flat["old_logprobs"], "b_advantages": flat["advantages"], "b_values": flat["old_values"]}
    space |= {"b_returns": flat["returns"], "entropy": -flat["old_logprobs"]}
    space["args"] = SimpleNamespace(clip_coef=0.2, norm_adv=False, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)
    exec(textwrap.dedent("\n".join(lines[start : stop + 1])), space)
    return {
        "loss": {"loss": space["loss"].item(), "gradient": gradient(space["loss"], new, value)},
        "approx_kl": space["approx_kl"].item(),
        "clip_fraction": space["clipfracs"][0],
    }


def trl(t, c, folder):
    ppo = source(folder / "experimental/ppo/ppo_trainer.py", "masked_mean", "masked_var", "masked_whiten")
    utils = source(folder / "trainer/utils.py", "selective_log_softmax")
    mask = t["mask"].bool()
    return {
        "whiten": lists({str(s): ppo.masked_whiten(t["advantages"], mask, shift_mean=s) for s in (True, False)}),
        "logprobs": lists(utils.selective_log_softmax(t["logits"], t["tokens"])),
    }


if __name__ == "__main__":
    peer, version, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3] if len(sys.argv) > 3 else ".")
    inputs = make_inputs()
    (HERE / "inputs.json").write_text(json.dumps(lists(inputs), indent=0) + "\n")
    outputs = globals()[peer](inputs["text"], inputs["control"], folder)
    (HERE / f"{peer}.json").write_text(json.dumps({"version": version, **outputs}, indent=0) + "\n")
    print(peer, list(outputs))
