"""Numbers and answers in readable form, and the sentences that say what happened."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from minirlhf.report.plotting import NAMES
from minirlhf.report.read import Row, Run

NOTHING = "–"


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number with a true minus sign, or a dash if it could not be measured.

    >>> number(-0.5), number(None), number(1.25, 1, sign=True)
    ('−0.50', '–', '+1.2')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")  # neither -0.00 nor +0.00
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage.

    >>> percent(0.744), percent(None)
    ('74 %', '–')
    """
    return NOTHING if value is None or not math.isfinite(value) else f"{number(100 * value, digits)} %"


def interval(bounds: Sequence[float] | None, digits: int = 0, scale: float = 100.0) -> str:
    """A 95 % interval in brackets, in percent; rounded outwards, so that it contains the computed one.

    >>> interval([0.71, 0.996]), interval([-0.254, 0.78], 2, scale=1), interval(None)
    ('[71, 100]', '[−0.26, 0.78]', '')
    """
    if bounds is None or not all(map(math.isfinite, bounds)):
        return ""
    low, high = (round(scale * 10**digits * bound, 6) for bound in bounds)  # 28.999999999999996 is 29
    return f"[{number(math.floor(low) / 10**digits, digits)}, {number(math.ceil(high) / 10**digits, digits)}]"


def with_interval(row: Row, key: str, digits: int = 0) -> str:
    """A share and its 95 % interval, if it has one.

    >>> with_interval({"accuracy": 0.744, "accuracy_interval": [0.71, 0.78]}, "accuracy")
    '74 % [71, 78]'
    """
    return f"{percent(row[key], digits)} {interval(row[f'{key}_interval'], digits)}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds in readable units.

    >>> duration(8.2), duration(221)
    ('8.2 s', '3 min 41 s')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def times(report: Row, digits: int) -> str:
    """How long the run took, and each part of it."""
    parts = ", ".join(
        f"{NAMES.get(part, part)} {number(seconds, digits)} s"
        for part, seconds in report["seconds"].items()
        if part != "total"
    )
    pairs = report.get("side_by_side") or []
    pairs = [["ppo", "ppo_ptx"]] if pairs is True else pairs  # as a run wrote it that knew no other methods
    beside = ", ".join(f"{NAMES[one]} and {NAMES[other]} at the same time" for one, other in pairs)
    return f"{duration(report['seconds']['total'])} ({parts}{'; ' if beside else ''}{beside})"


def parameters(count: int | None) -> str:
    """A count of parameters.

    >>> parameters(381_000), parameters(52_000)
    ('0.38 million parameters', '52 thousand parameters')
    """
    if count is None:
        return "an unknown number of parameters"
    if count >= 1e9:
        return f"{count / 1e9:.2g} billion parameters"
    if count >= 1e5:
        return f"{count / 1e6:.2g} million parameters" if count < 1e8 else f"{count / 1e6:.0f} million parameters"
    return f"{count / 1e3:.0f} thousand parameters"


def readable(text: str) -> str:
    """Join punctuation to its word and capitalize sentences, but only in texts that are all lower case.

    >>> readable("sure ! one : a fox , maybe . i hope this helps !")
    'Sure! One: a fox, maybe. I hope this helps!'
    >>> readable("Leave This , please")
    'Leave This , please'
    """
    if text != text.lower():
        return text
    text = re.sub(r"[ \t]+([.,!?;:])", r"\1", text)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text).strip()
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?]\s+|\n)([a-z])", lambda match: match[1] + match[2].upper(), text)


def verdict(row: Row, other: str) -> str:
    """Whether a policy is preferred to another: better, worse, or unclear if the interval contains one half."""
    rate, bounds = row[f"win_rate_vs_{other}"], row[f"win_rate_vs_{other}_interval"]
    if rate is None or not interval(bounds) or bounds[0] <= 0.5 <= bounds[1]:
        return "unclear"
    return "better" if bounds[0] > 0.5 else "worse"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["PPO", "RLOO", "DPO"])
    'PPO, RLOO and DPO'
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def count(n: int) -> str:
    """A small number as a word.

    >>> count(5), count(12)
    ('five', '12')
    """
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    return words[n] if n < len(words) else str(n)


def learners(run: Run) -> list[str]:
    """The methods that maximize the reward; PPO-ptx counts as PPO. DPO is not one of them: it never asks it."""
    return list(dict.fromkeys("PPO" if name == "ppo_ptx" else NAMES[name] for name in run.methods if name != "dpo"))


def judge(run: Run) -> str:
    """What the reward model is to the policies that it judges."""
    pleased = learners(run)
    if not pleased:
        return "a reward model of the same rankings that DPO learned from"
    return f"the reward model that {listed(pleased)} {'was' if len(pleased) == 1 else 'were'} trained against"


def headline(run: Run) -> str:
    """One sentence that says what happened, good or bad."""
    best = max(run.methods, key=lambda name: run.policy(name)["win_rate_vs_sft"] or 0.0)
    step = "step 3" if "dpo" in run.methods else "reinforcement learning"
    row, name = run.policy(best), NAMES[best]
    rate = percent(row["win_rate_vs_sft"])
    who = f"A model of {parameters(run.report['parameters'])}"
    prompts = f"{run.report['heldout_prompts']:,} prompts it had never seen"
    outcome = verdict(row, "sft")
    if outcome == "worse":  # and the other policy is no better
        preferred = "is preferred to its SFT parent" if run.is_gold else "scores above its SFT parent"
        several = len(run.methods)
        top = f"even the {'better' if several == 2 else 'best'} of its {count(several)} policies, {name},"
        return (
            f"{who} was made worse by {step}: {top if several > 1 else f'its {name} policy'} "
            f"{preferred} on only {rate} of {prompts}."
        )
    if outcome == "unclear":
        return (
            f"{who} gained nothing certain from {step}: its {name} answers are preferred to its SFT "
            f"parent’s on {rate} of {prompts}, too close to one half to tell."
        )
    time = duration(run.report["seconds"]["total"])
    if not run.is_gold:
        return (
            f"{who} was trained in {time}: its own reward model, which is no independent judge, prefers its {name} "
            f"answers to its SFT parent’s on {rate} of {prompts}."
        )
    learned = "learned to follow instructions" if verdict(row, "base") == "better" else "was trained"
    return f"{who} {learned} in {time}: its {name} answers are preferred to its SFT parent’s on {rate} of {prompts}."


def findings(run: Run) -> list[str]:
    """A few more sentences: each step against its parent, the proxy, the tax."""
    return [
        sentence
        for sentence in (_preset(run), _given(run), _sft(run), _methods(run), _proxy(run), _tax(run))
        if sentence
    ]


def _preset(run: Run) -> str:
    told = "This is the fast preset: it shows that everything runs, but is too short to learn much. Omit it for more."
    return told if run.report["preset"] == "fast" else ""


def _given(run: Run) -> str:
    """What was not trained here. A run from before this was kept says nothing."""
    given: Row = run.report.get("given", {})
    told = [f"{NAMES[step]} ({given[step]})" for step in ("base", "sft", "reward_model") if step in given]
    said = f"Given, not trained here: {', '.join(told)}." if told else ""
    if "reward" in given:
        said += f" The reward is the function {given['reward']}; where this page says reward model, it means this."
    return said.strip()


def _sft(run: Run) -> str:
    sft, base = run.policy("sft"), run.policy("base")
    told = {
        "better": "Demonstrations helped",
        "worse": "Demonstrations hurt: the SFT model is worse than its base",
        "unclear": "Demonstrations made no clear difference",
    }[verdict(sft, "base")]
    told += "" if run.is_gold else ", as far as the reward model can tell"
    judged = "gold score" if run.is_gold else "reward model score"
    means = f"base {number(base['gold_mean'])}, SFT {number(sft['gold_mean'])}"
    return f"{told}. Mean {judged}: {means}; SFT wins {with_interval(sft, 'win_rate_vs_base')} against base."


def _methods(run: Run) -> str:
    outcomes = {"better": "is better than", "worse": "is worse than", "unclear": "can’t be told from"}
    parts = []
    for name in run.methods:
        row = run.policy(name)
        told = f"{NAMES[name]} {outcomes[verdict(row, 'sft')]} SFT"
        gain = f"{number(row['gold_gain_vs_sft'])} {interval(row['gold_gain_vs_sft_interval'], 2, scale=1)}".rstrip()
        mean = f"mean {number(row['gold_mean'])}, a gain of {gain}"
        parts.append(f"{told} (it wins {with_interval(row, 'win_rate_vs_sft')}, {mean})")
    return ("" if run.is_gold else "By the reward model’s score, ") + "; ".join(parts) + "."


def _proxy(run: Run) -> str:
    """The signature of over-optimisation: the proxy rises while the truth falls."""
    sft = run.policy("sft")
    for name in [name for name in run.methods if name != "dpo"]:
        row = run.policy(name)
        if run.is_gold and row["proxy_mean"] > sft["proxy_mean"] and row["gold_mean"] < sft["gold_mean"]:
            return (
                f"The reward model was exploited: {NAMES[name]} raised its score from {number(sft['proxy_mean'])} to "
                f"{number(row['proxy_mean'])} while the true score fell from {number(sft['gold_mean'])} to "
                f"{number(row['gold_mean'])}. Try a larger beta, fewer steps or more comparisons."
            )
    return ""


def _tax(run: Run) -> str:
    """What the first of the methods cost in language, and what the others did."""
    tax, (first, *others) = run.report["alignment_tax"], run.methods
    name, paid = NAMES[first], tax[first]
    if paid is None or not math.isfinite(paid):
        return ""
    if abs(paid) < 0.01:
        text = f"{name} cost next to nothing in language: {number(paid, 3)} nats per token on held-out text"
    elif paid < 0:
        below = number(-paid, 3)
        text = f"{name} cost nothing in language: its loss on held-out text is {below} nats below the base’s"
    else:
        text = (
            f"Alignment has a price in language: on held-out text {name} loses {number(paid, 3)} nats per token more "
            f"than the base model ({number(tax['sft'], 3)} of them were lost in SFT already)"
        )
        if others[:1] == ["ppo_ptx"]:
            text += _removed(tax["ppo_ptx"], tax["removed_by_ptx"])
    others = [other for other in others if other != "ppo_ptx"]
    told = ", ".join(f"{NAMES[other]} {number(tax[other], 3, sign=True)}" for other in others)
    return f"{text}. The loss of the others, in nats per token above the base model’s: {told}." if told else f"{text}."


def _removed(with_ptx: float | None, removed: float | None) -> str:
    if removed is None or with_ptx is None:
        return ""
    if removed < 0:
        return f"; PPO-ptx loses more still ({number(with_ptx, 3)})"
    return "; PPO-ptx wins it all back" if removed >= 1 else f"; PPO-ptx wins {percent(removed)} of it back"
