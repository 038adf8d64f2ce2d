"""Studios: the learner writes a whole training loop, marked by what holds of a right one however it is written.

In a studio's notebook:

    from minirlhf_course.studios import reinforce as studio

    def my_reinforce(envs, policy, values, *, total_steps, ...):
        ...  # your code here

    marks = studio.reinforce(my_reinforce)  # prints a table of properties, each passed or failed

| file | what it holds |
|---|---|
| `studio` | the machine: `Studio`, `Property`, `Failure`, `Marks` |
| `environments` | what a trainer is given to play in |
| `session` | runs a trainer and watches: what it plays, the gradient of every update |
| `ledger` | environments in which a gradient tells what weight each single step was given |
| `mistakes`, `targets`, `advantages` | what a step is worth to a right trainer, and to one with a known mistake |
| `referee` | the exact gradient, the package's own trainer, CartPole |
| `probes` | five problems that a right trainer solves in seconds, and how actions are drawn |
| `equation9` | the terms of PPO's loss, its minibatches, its log |
| `given` | what an RLHF trainer is given: logits, values, samples; and a run of it on any models |
| `tables`, `dictation` | language models that are nothing but tables, and a trainer watched on them |
| `credit`, `equation2`, `text_losses` | what each token of an answer is worth, and the terms of RLHF's objective |
| `text_probes` | the five probes for text, and the package's own RLHF |
| `reinforce`, `actor_critic`, `ppo`, `rlhf` | one studio each: its stub, its properties, its likely mistakes |

Nothing here draws, and nothing of the package imports it.
"""
