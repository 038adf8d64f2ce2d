"""One process of the test of adapters: ``python adapters_worker.py FOLDER``.

A frozen body in bfloat16, adapters in float32, layers computed again in backward: SFT, reward model and PPO take two
steps each, as `minirlhf run --lora.rank` has them. Kept are each step's summed gradients, the answers and the metrics.

bfloat16 rounds differently in another batch, and one token drawn differently would change all that follows. So tokens
are drawn without looking at the logits; their log-probs are the model's as ever.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from minirlhf import parallel
from minirlhf.language import generation
from minirlhf.language.adapters import LoraConfig, add_lora, lora_scalar_from
from minirlhf.language.forward import recompute_layers
from minirlhf.language.models import share
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.training import Recorder

sys.path.insert(0, str(Path(__file__).parent))  # where it is collected and not run
from worker import BLOCKS, COMPARISONS, DEMONSTRATIONS, PROMPTS, TOKENIZER, causal

LORA, STEPS, BATCH = LoraConfig(rank=3), 2, 5
SHARED = {"batch_size": BATCH, "warmup": 0, "micro_batch_tokens": 60}


def ready(model):
    recompute_layers(model)
    return model


def train(said: list[str], logged: dict[str, list[dict[str, float]]]) -> None:
    recorders = {name: Recorder(name, progress=False) for name in ("sft", "reward_model", "rlhf")}
    epochs = STEPS * BATCH / len(DEMONSTRATIONS)
    sft = ready(add_lora(causal(torch.bfloat16), LORA, seed=1, base="body"))
    train_sft(sft, TOKENIZER, DEMONSTRATIONS, SFTConfig(epochs=epochs, **SHARED), recorder=recorders["sft"])
    reward = train_reward_model(
        ready(lora_scalar_from(sft, LORA, seed=2, base="body")),
        TOKENIZER,
        COMPARISONS,
        RewardModelConfig(epochs=epochs, **SHARED),
        demonstrations=DEMONSTRATIONS,
        recorder=recorders["reward_model"],
    )
    policy, value = ready(share(sft)), ready(share(reward))
    reference, scorer = sft.requires_grad_(False), RewardModelScorer(reward.requires_grad_(False), TOKENIZER)
    settings = RLHFConfig(
        steps=STEPS,
        minibatch_size=3,
        max_response_tokens=9,
        ptx_coef=0.3,
        ptx_batch_size=3,
        cache_tokens=40,
        lr=1e-3,
        value_lr=1e-3,
        **SHARED,
    )

    def monitor(prompts: list[str], responses: list[str], ended: list[bool]) -> dict[str, float]:
        said.extend(responses)
        return {}

    options = {"corpus_blocks": BLOCKS, "recorder": recorders["rlhf"], "monitor": monitor}
    train_rlhf(policy, value, reference, scorer, TOKENIZER, PROMPTS, settings, **options)
    for name, recorder in recorders.items():
        logged[name] = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in recorder.history]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    kept: dict[str, torch.Tensor] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        grads = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in grads)
        kept[f"{len(kept):02}"] = torch.cat(grads)
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = keep
    generation.draw = lambda logits, chances: (1 + 19 * chances).long()  # 1 is EOS
    with parallel.joined(torch.device("cpu")):
        said: list[str] = []
        logged: dict[str, list[dict[str, float]]] = {}
        train(said, logged)
        if parallel.rank() == 0:
            save_file(kept, folder / "gradients.safetensors")
            (folder / "said.json").write_text(json.dumps({"said": said, "logged": logged}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
