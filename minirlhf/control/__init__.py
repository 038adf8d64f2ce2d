"""From REINFORCE to PPO on gymnasium tasks: one file an algorithm, the same call and the same result for each.

    from minirlhf.control.ppo import PPOConfig, train_ppo

    result = train_ppo("CartPole-v1", PPOConfig(total_steps=30_000), seed=1)
    result.policy, result.values      # trained networks
    result.history                    # one row of metrics per iteration
    result.episodes                   # every episode that ended: (env_steps, episode_return, length, terminated)
    result.env_steps, result.seconds  # what it took

| file | trainers | settings |
|---|---|---|
| `reinforce` | `train_reinforce`, `train_reinforce_with_baseline` | `ReinforceConfig`, `BaselineConfig` |
| `actor_critic` | `train_actor_critic` (one step), `train_a2c` (n steps or GAE) | `ActorCriticConfig`, `A2CConfig` |
| `trpo` | `train_trpo` | `TRPOConfig` |
| `ppo` | `train_ppo` | `PPOConfig` |

Every trainer takes:

- `env`: a gymnasium id, or a function from a number of environments to a VectorEnv that resets on the next step.
- `config`: its settings, a frozen dataclass (`dataclasses.replace(config, lr=1e-3)` to vary); the defaults are tuned
  for CartPole-v1.
- `seed`: of the weights, the environments, the actions and the minibatches: the same seed, the same result.
- `networks`: a `Networks(policy, values)` from `policies.make_networks` (or your own) to train in place; None makes
  them from `config.hidden`, `config.activation` and `seed`.
- `progress`: whether to draw a bar.
- `callback`: called with a `run.Progress` after every iteration; returning True ends the training. Its time is not
  counted in the seconds. `evaluation.Evaluator` is one: it evaluates on a schedule and can stop at a target.

and raises `UserError` for settings or environments that don't fit, and `TrainingError` where a loss, a reward or an
observation is NaN or infinite.

Around them: `policies` (networks for discrete and continuous actions), `rollout` (vectorised play, terminated and
truncated told apart), `evaluation` (`evaluate`, `Evaluator`), and `run` (the clock and the metrics). The
mathematics is that of `minirlhf.returns`, `minirlhf.losses` and `minirlhf.kl`, the same that RLHF runs on.

Metric names: perf/env_steps, perf/seconds; objective/episode_return and objective/episode_length (the mean over the
episodes that ended in the iteration; absent where none did); policy/loss, policy/entropy, policy/grad_norm;
value/loss, value/explained_variance; and what each algorithm adds.
"""
