"""From REINFORCE to PPO on gymnasium tasks: one file per algorithm, all with the same call and result.

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
- `config`: its settings, a frozen dataclass (vary it by `dataclasses.replace(config, lr=1e-3)`); the defaults are
  tuned for CartPole-v1.
- `seed`: of the weights, the environments, the actions and the minibatches; the same seed gives the same result.
- `networks`: a `Networks(policy, values)` from `policies.make_networks` (or your own) to train in place; None creates
  them from `config.hidden`, `config.activation` and `seed`.
- `progress`: whether to draw a progress bar.
- `callback`: called with a `run.Progress` after every iteration; returning True ends the training. Its time is not
  counted in the seconds. `evaluation.Evaluator` is one: it evaluates on a schedule and can stop at a target.

and raises `UserError` for invalid settings or environments, and `TrainingError` if a loss, a reward or an observation
is NaN or infinite.

Other modules: `policies` (networks for discrete and continuous actions), `rollout` (vectorised play that tells
terminated from truncated), `evaluation` (`evaluate`, `Evaluator`), and `run` (time and metrics). The mathematics is in
`minirlhf.returns`, `minirlhf.losses` and `minirlhf.kl`, which RLHF uses too.

Metric names: perf/env_steps, perf/seconds; objective/episode_return and objective/episode_length (the mean over the
episodes that ended in the iteration; absent if none did); policy/loss, policy/entropy, policy/grad_norm;
value/loss, value/explained_variance; and what each algorithm adds.
"""
