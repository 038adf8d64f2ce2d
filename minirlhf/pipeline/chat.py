"""Type an instruction, see the models of a run answer beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minirlhf.errors import CheckpointError
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import POLICIES, hide_loading_bars, load_policy, read_config

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}


def chat(
    run: Path,
    *,
    prompts: Sequence[str] = (),
    temperature: float = 0.7,
    greedy: bool = False,
    max_response_tokens: int = 40,
    seed: int = 0,
) -> None:
    """Answer instructions with every finished policy of a run, until an empty line.

    Args:
        run: folder of a run; steps that are not finished yet are left out.
        prompts: answer these and stop; without any, ask at the terminal.
        temperature: of sampling.
        greedy: take the most likely token instead.
        max_response_tokens: answers are cut after so many tokens.
        seed: of sampling.

    Raises:
        CheckpointError: the folder is no run, or holds no finished policy.
    """
    read_config(run)
    hide_loading_bars()
    names = [name for name in POLICIES if (run / name).is_dir()]
    if not names:
        raise CheckpointError(f"{run}: no policy is finished yet; let the run go on")
    device = torch.device("cpu")
    models = {name: load_policy(run, name, device) for name in names}
    tokenizer = load_tokenizer(run / names[0])
    unknown = tokenizer.unk_token_id
    settings = EvaluationConfig(temperature=temperature, max_response_tokens=max_response_tokens)
    for turn, prompt in enumerate(prompts or _typed()):
        if unknown is not None:
            odd = [word for word in prompt.split() if tokenizer.convert_tokens_to_ids(word) == unknown]
            if odd:
                print(f"(this small world has no word for: {', '.join(odd)})")
        for name in names:
            said = answer(models[name], tokenizer, [prompt], settings, seed=seed + turn, greedy=greedy)
            cut = "" if said.ended[0] else " ..."
            print(f"  {NAMES[name]:>8}  {said.responses[0]}{cut}")


def _typed() -> Iterator[str]:
    print("Type an instruction, for example: write a story about frogs    (an empty line ends)")
    while True:
        try:
            prompt = input("> ").strip().lower()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt
