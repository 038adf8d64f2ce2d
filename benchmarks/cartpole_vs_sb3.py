"""PPO on CartPole-v1 against stable-baselines3, and every algorithm of `minirlhf.control` on its task.

    .venv/bin/python benchmarks/cartpole_vs_sb3.py                  both tables, about 8 minutes on two cores
    .venv/bin/python benchmarks/cartpole_vs_sb3.py --only sb3       PPO against stable-baselines3
    .venv/bin/python benchmarks/cartpole_vs_sb3.py --only algorithms

stable-baselines3 lives in a throw-away environment that this script makes (build/sb3-venv) and never in the project's
own. Each training is a process of its own; seeds take turns (ours 0, theirs 0, ours 1, ...), so that a machine which
slows down slows both.

The same on both sides:
    budget       100,000 environment steps; schedules (learning rate, clip) run over all of them
    target       the first evaluation whose 20 greedy episodes average at least 475
    evaluation   `evaluate` below, one function for both, on gymnasium's native vector CartPole with fixed seeds; after
                 the first iteration (collect, then update) that ends at or past each multiple of 2,048 steps
    clock        starts after the imports (torch's late ones too), before environments and networks are made;
                 STANDS STILL during evaluations; `seconds_with_evaluation` is the same with them
    threads      one (torch.set_num_threads and OMP_NUM_THREADS): with networks this small a second one slows both
    final        training goes on to the end of the budget; then 20 greedy episodes

What differs: stable-baselines3 runs rl-zoo's tuned settings for CartPole-v1 (SB3 below) with its default networks and
its DummyVecEnv; minirlhf runs the defaults of PPOConfig on the native vector CartPole.

The second table: the same evaluation for every algorithm, each with its defaults, stopped at the target; and PPO on
Pendulum-v1 with `minirlhf.control.ppo.PENDULUM`, where the budget is the time: 20 greedy episodes after the last step.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "sb3-venv"
RESULTS = ROOT / "benchmarks" / "results"
REQUIREMENTS = ("torch==2.13.0", "gymnasium==1.4.0", "stable-baselines3==2.9.2")

BUDGET, EVERY, EPISODES, TARGET, EVALUATION_SEED = 100_000, 2_048, 20, 475.0, 1000
# rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1; the two rates are lines from these values to 0.
SB3 = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0}
SB3_ENVS, SB3_LR, SB3_CLIP = 8, 1e-3, 0.2


# --- What both sides share: runs in either environment, so it imports neither minirlhf nor stable-baselines3. ---


def evaluate(act: Callable[[Any], Any]) -> float:
    """The mean return of EPISODES whole episodes of CartPole-v1. act: observations [N, 4] -> actions [N] int64."""
    import gymnasium
    import numpy as np

    envs = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    observations, _ = envs.reset(seed=EVALUATION_SEED)
    returns, running = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while running.any():
        observations, rewards, terminated, truncated, _ = envs.step(act(observations))
        returns += rewards * running
        running &= ~(terminated | truncated)
    return float(returns.mean())


class Watch:
    """The clock, the schedule and the target; `look` is called after each iteration."""

    def __init__(self) -> None:
        self.began, self.paused, self.next = time.perf_counter(), 0.0, EVERY
        self.reached: dict[str, float] = {}

    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.paused

    def look(self, env_steps: int, act: Callable[[Any], Any]) -> bool:
        """Evaluate if it is time to; True once the target is reached."""
        if env_steps < self.next or self.reached:
            return bool(self.reached)
        self.next = (env_steps // EVERY + 1) * EVERY
        seconds, began = self.seconds(), time.perf_counter()
        mean_return = evaluate(act)
        self.paused += time.perf_counter() - began
        if mean_return >= TARGET:
            self.reached = {
                "steps_to_target": env_steps,
                "seconds_to_target": seconds,
                "seconds_with_evaluation": seconds + self.paused,
            }
        return bool(self.reached)

    def report(self, env_steps: int, act: Callable[[Any], Any]) -> dict[str, float]:
        seconds = self.seconds()
        return self.reached | {"total_steps": env_steps, "total_seconds": seconds, "final_return": evaluate(act)}


# --- One training, in a process of its own. ---


def train_sb3(seed: int) -> dict[str, float]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    watch = Watch()

    class Look(BaseCallback):
        def _on_rollout_start(self) -> None:  # the update before it is done
            watch.look(self.num_timesteps, act)

        def _on_step(self) -> bool:
            return True

    def act(observations: Any) -> Any:
        return model.predict(observations, deterministic=True)[0]

    envs = make_vec_env("CartPole-v1", n_envs=SB3_ENVS, seed=seed)
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=lambda left: SB3_LR * left,
        clip_range=lambda left: SB3_CLIP * left,
        seed=seed,
        device="cpu",
        **SB3,
    )
    model.learn(BUDGET, callback=Look())
    watch.look(model.num_timesteps, act)
    return watch.report(model.num_timesteps, act)


def train_ours(algorithm: str, seed: int, stop: bool) -> dict[str, float]:
    import torch

    from minirlhf.control.run import Progress

    train, config, env = _ours(algorithm)
    watch = Watch()

    def actor(policy: Any) -> Callable[[Any], Any]:
        def act(observations: Any) -> Any:
            with torch.inference_mode():
                return policy.mode(policy(torch.from_numpy(observations))).numpy()

        return act

    if env == "CartPole-v1":

        def callback(progress: Progress) -> bool:
            return watch.look(progress.env_steps, actor(progress.policy)) and stop

        result = train(env, config, seed=seed, callback=callback)
        return watch.report(result.env_steps, actor(result.policy))

    from minirlhf.control.evaluation import evaluate as evaluate_anywhere

    result = train(env, config, seed=seed)
    seconds = watch.seconds()
    final = evaluate_anywhere(result.policy, env, EPISODES, seed=EVALUATION_SEED)
    return {"total_steps": result.env_steps, "total_seconds": seconds, "final_return": float(final.mean())}


ALGORITHMS = ("reinforce", "baseline", "actor-critic", "a2c", "trpo", "ppo", "ppo-pendulum")


def _ours(algorithm: str) -> tuple[Any, Any, str]:
    from minirlhf.control.actor_critic import A2CConfig, ActorCriticConfig, train_a2c, train_actor_critic
    from minirlhf.control.ppo import PENDULUM, PPOConfig, train_ppo
    from minirlhf.control.reinforce import (
        BaselineConfig,
        ReinforceConfig,
        train_reinforce,
        train_reinforce_with_baseline,
    )
    from minirlhf.control.trpo import TRPOConfig, train_trpo

    return {
        "reinforce": (train_reinforce, ReinforceConfig(total_steps=BUDGET), "CartPole-v1"),
        "baseline": (train_reinforce_with_baseline, BaselineConfig(total_steps=BUDGET), "CartPole-v1"),
        "actor-critic": (train_actor_critic, ActorCriticConfig(total_steps=BUDGET), "CartPole-v1"),
        "a2c": (train_a2c, A2CConfig(total_steps=BUDGET), "CartPole-v1"),
        "trpo": (train_trpo, TRPOConfig(total_steps=BUDGET), "CartPole-v1"),
        "ppo": (train_ppo, PPOConfig(total_steps=BUDGET), "CartPole-v1"),
        "ppo-pendulum": (train_ppo, PENDULUM, "Pendulum-v1"),
    }[algorithm]


def worker(library: str, algorithm: str, seed: int, stop: bool) -> None:
    import gymnasium
    import torch

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports half of torch: before the clock
    versions = f"torch {torch.__version__}, gymnasium {gymnasium.__version__}"
    if library == "stable-baselines3":
        import stable_baselines3

        measured: dict[str, Any] = dict(train_sb3(seed))
        versions += f", stable-baselines3 {stable_baselines3.__version__}"
    else:
        import minirlhf

        measured = dict(train_ours(algorithm, seed, stop))
        versions += f", minirlhf {minirlhf.__version__}"
    print(json.dumps(measured | {"versions": versions}))


# --- The driver: runs in the project's environment. ---


def make_venv() -> Path:
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark = VENV / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS)
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"making {VENV.relative_to(ROOT)} ...", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        mark.write_text(wanted)
    return python


def measure(library: str, algorithm: str, seed: int, stop: bool = False) -> dict[str, Any]:
    python = make_venv() if library == "stable-baselines3" else sys.executable
    command = [python, __file__, "--worker", library, "--algorithm", algorithm, "--seed", seed] + ["--stop"] * stop
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if library == "minirlhf" else ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = {"library": library, "algorithm": algorithm, "seed": seed} | json.loads(done.stdout.splitlines()[-1])
    when = f"{row['steps_to_target']:>7,} steps {row['seconds_to_target']:6.2f} s" if "steps_to_target" in row else " -"
    print(
        f"{library:18} {algorithm:13} seed {seed}   to 475: {when:>23}   after {row['total_steps']:>7,} steps "
        f"({row['total_seconds']:5.1f} s): {row['final_return']:7.1f}",
        flush=True,
    )
    return row


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, rows: list[dict[str, Any]], arguments: list[str]) -> None:
    facts = {
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/cartpole_vs_sb3.py", *arguments]),
    }
    columns = ["library", "algorithm", "seed", "steps_to_target", "seconds_to_target", "seconds_with_evaluation"]
    columns += ["total_steps", "total_seconds", "final_return", "versions", *facts]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / name, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            row = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(row | facts)
    print(f"wrote {(RESULTS / name).relative_to(ROOT)}\n")


def median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row.get(key, float("inf")) for row in rows)


def against_sb3(seeds: int, arguments: list[str]) -> None:
    make_venv()
    turns = [(library, seed) for seed in range(seeds) for library in ("minirlhf", "stable-baselines3")]
    rows = [measure(library, "ppo", seed) for library, seed in turns]
    ours = [row for row in rows if row["library"] == "minirlhf"]
    theirs = [row for row in rows if row["library"] != "minirlhf"]
    for key in ("seconds_to_target", "seconds_with_evaluation", "steps_to_target", "total_seconds"):
        a, b = median(ours, key), median(theirs, key)
        print(f"median {key:24} minirlhf {a:10.2f}   stable-baselines3 {b:10.2f}   ratio {a / b:.3f}")
    for name, part in (("minirlhf", ours), ("stable-baselines3", theirs)):
        reached = sum("steps_to_target" in row for row in part)
        perfect = sum(row["final_return"] == 500 for row in part)
        print(f"{name}: target reached by {reached} of {seeds} seeds; 500 after the budget by {perfect} of {seeds}")
    write("cartpole_vs_sb3.csv", rows, arguments)


def all_algorithms(seeds: int, arguments: list[str]) -> None:
    rows = [measure("minirlhf", name, seed, stop=True) for name in ALGORITHMS for seed in range(seeds)]
    for name in ALGORITHMS:
        part = [row for row in rows if row["algorithm"] == name]
        if name == "ppo-pendulum":
            returns = sorted(row["final_return"] for row in part)
            print(
                f"{name}: {median(part, 'total_steps'):,.0f} steps, {median(part, 'total_seconds'):.1f} s, final "
                f"{returns[0]:.0f} to {returns[-1]:.0f} (median {statistics.median(returns):.0f})"
            )
            continue
        reached = [row for row in part if "steps_to_target" in row]
        print(
            f"{name}: {len(reached)} of {seeds} seeds within {BUDGET:,} steps; median "
            f"{median(part, 'steps_to_target'):,.0f} steps, {median(part, 'seconds_to_target'):.1f} s; slowest "
            f"{max((row['seconds_to_target'] for row in reached), default=float('nan')):.1f} s"
        )
    write("cartpole_algorithms.csv", rows, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("sb3", "algorithms"))
    parser.add_argument("--worker", choices=("minirlhf", "stable-baselines3"), help=argparse.SUPPRESS)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ppo", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.algorithm, options.seed, options.stop)
        return
    if options.only != "algorithms":
        against_sb3(options.seeds, sys.argv[1:])
    if options.only != "sb3":
        all_algorithms(options.seeds, sys.argv[1:])


if __name__ == "__main__":
    main()
