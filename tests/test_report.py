"""The page and the table of a finished run: true numbers, honest sentences, nothing fetched, nothing half-written."""

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minirlhf.errors import CheckpointError
from minirlhf.report import plotting, summary_table, write_report
from minirlhf.report.read import load_run
from minirlhf.report.text import duration, findings, headline, interval, number, parameters, percent, readable

STEPS = ("base", "sft", "reward_model", "ppo", "ppo_ptx")
PHASES = ("preparation", *STEPS, "evaluation", "total")
VOID = {"meta", "br", "hr", "img", "input", "link"}


def policy(gold: float, base: float, sft: float, proxy: float, loss: float) -> dict[str, Any]:
    """One entry of report.json's evaluation, with every key that evaluate.py writes."""
    row: dict[str, Any] = {"gold_mean": gold, "gold_standard_error": 0.046, "headroom_closed": (gold + 0.87) / 4.33}
    row["headroom_closed_interval"] = [row["headroom_closed"] - 0.011, row["headroom_closed"] + 0.011]
    for other, rate, half in (("sft", sft, 0.034), ("base", base, 0.021)):
        row[f"win_rate_vs_{other}"] = rate
        row[f"win_rate_vs_{other}_interval"] = [max(0.0, rate - half), min(1.0, rate + half)]
        row |= {f"gold_gain_vs_{other}": gold - 1.27, f"gold_gain_vs_{other}_interval": [gold - 1.36, gold - 1.18]}
    row |= {"kl_to_sft": 6.78, "mean_length": 13.4, "ended_fraction": 0.987}
    return row | {"proxy_mean": proxy, "corpus_loss": loss}


REPORT: dict[str, Any] = {
    "judge": "gold",
    "heldout_prompts": 600,
    "distinct_prompts": 480,
    "best_mean": 3.46,
    "evaluation": {
        "base": policy(-0.87, 0.5, 0.08, -4.1, 0.823),
        "sft": policy(1.27, 0.92, 0.5, 0.12, 1.049),
        "ppo": policy(2.02, 0.96, 0.74, 2.3, 1.224),
        "ppo_ptx": policy(1.94, 0.95, 0.69, 2.05, 0.851),
    },
    "reward_model": {
        "accuracy": 0.847,
        "accuracy_interval": [0.8361, 0.8572],
        "ceiling": 0.871,
        "length_baseline": 0.561,
        "pairs": 6312,
        "accuracy_heldout_labelers": 0.828,
        "accuracy_heldout_labelers_interval": [0.8103, 0.8441],
        "ceiling_heldout_labelers": 0.866,
        "length_baseline_heldout_labelers": 0.548,
        "pairs_heldout_labelers": 2104,
        "calibration_error": 0.031,
    },
    "alignment_tax": {"sft": 0.226, "ppo": 0.401, "ppo_ptx": 0.028, "removed_by_ptx": 0.93},
    "parameters": 381_000,
    "seconds": dict(zip(PHASES, (3.2, 71.2, 14.1, 31.3, 40.0, 52.0, 9.2, 221.0), strict=True)),
    "seed": 7,
    "preset": "default",
    "data": "small_world",
    "command": "minirlhf run --seed 7",
    "versions": {"minirlhf": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
    "machine": {"device": "cpu", "threads": 2, "platform": "Linux"},
}
PARTS = {"helpful": 2.31, "truthful": -0.8, "harmless": 0.0, "well_formed": 0.5}
ANSWERS = {  # of each policy, with its score
    "base": ("write a poem \n where does a fox <script>alert(1)</script>", -1.25),
    "sft": ("", -2.6),
    "ppo": ("sure ! a penguin lives in the snow , i hope this helps !", 2.01),
    "ppo_ptx": ('an "owl" & a <b>bee</b> .', 1.11),
}
PPO = {"objective/score": (0.0, 0.1), "objective/kl": (0.0, 0.4), "objective/beta": (0.1, 0.0)}  # start and slope
PPO |= {"objective/entropy": (11.0, -0.2), "objective/response_length": (12.0, 0.1), "policy/approx_kl": (0.01, 0.0)}
PPO |= {"objective/ended_fraction": (0.98, 0.0), "policy/clip_fraction": (0.1, 0.0), "objective/gold": (1.0, 0.05)}


def build(folder: Path, report=REPORT, *, parts=PARTS, best: float | None = 3.5, with_base: bool = True) -> Path:
    """A small finished run, as the pipeline leaves it."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.json").write_text(json.dumps({"seed": 7, "data": "/secret/place", "rlhf": {"beta": 0.1234}}))
    answers = {
        name: {"response": text, "ended": name != "base", "score": parts | {"total": total}}
        for name, (text, total) in ANSWERS.items()
    }
    example = {"prompt": "where does a <penguin> live ?", "best": best, "answers": answers}
    (folder / "answers.json").write_text(json.dumps([example]))
    shown = {key: line for key, line in PPO.items() if key != "objective/gold" or report["judge"] == "gold"}
    ppo = [{key: start + slope * i for key, (start, slope) in shown.items()} for i in range(20)]
    ppo = [row | {"value/explained_variance": -20.0 if i == 0 else 0.6} for i, row in enumerate(ppo)]
    metrics = {
        "base": [{"base/loss": 0.8 + 5 / (i + 1)} for i in range(450)] if with_base else [],
        "sft": [{"sft/loss": 0.9 + 1 / (i + 1)} for i in range(20)],
        "reward_model": [
            {"reward_model/loss": 0.7 - 0.01 * i, "reward_model/accuracy": 0.5 + 0.01 * i} for i in range(30)
        ],
        **{"ppo": ppo, "ppo_ptx": ppo},
    }
    for name, rows in metrics.items():
        (folder / name).mkdir()
        lines = [json.dumps({"step": i} | row) + "\n" for i, row in enumerate(rows)]
        (folder / name / "metrics.jsonl").write_text("".join(lines))
    return folder


def worse() -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    report["evaluation"]["ppo"] = policy(-0.4, 0.6, 0.22, 5.6, 1.3)
    report["evaluation"]["ppo_ptx"] = policy(0.1, 0.7, 0.31, 5.1, 0.9)
    return report


def by_proxy() -> dict[str, Any]:
    report = copy.deepcopy(REPORT) | {"judge": "reward_model", "best_mean": None, "data": "my texts"}
    for row in report["evaluation"].values():
        row |= {"headroom_closed": None, "headroom_closed_interval": None}
    row = report["reward_model"]
    row |= {key: None for key in row if "ceiling" in key or "heldout_labelers" in key}
    row["pairs_heldout_labelers"] = 0
    report["alignment_tax"]["removed_by_ptx"] = None
    report["evaluation"]["ppo"] |= {"gold_standard_error": None, "gold_gain_vs_sft_interval": None}
    return report


class Reader(HTMLParser):
    """Text of a page, every attribute, and whether its elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.attributes, self.open = "", [], []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", self.text.replace("\u00a0", " "))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)  # <path/> comes here too, and then to handle_endtag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build(tmp_path_factory.mktemp("report") / "good")
    assert write_report(run) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def page(good: Path) -> str:
    return (good / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


@pytest.fixture(scope="module")
def proxy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build(tmp_path_factory.mktemp("report") / "proxy", by_proxy(), parts={}, best=None, with_base=False)
    write_report(run)
    return run


@pytest.mark.parametrize(
    "shown",
    [
        # headline and findings
        "A model of 0.38 million parameters learned to follow instructions in 3 min 41 s: its PPO answers are "
        "preferred to its SFT parent’s on 74 % of 600 prompts it had never seen.",
        "PPO-ptx is better than SFT (it wins 69 % [65, 73], mean 1.94, a gain of 0.67 [0.58, 0.76])",
        "PPO loses 0.401 nats per token more than the base model (0.226 of them were lost in SFT already)",
        "PPO-ptx wins 93 % of it back",
        # results, with every kind of number
        *("−0.87", "± 0.05", "67 %", "74 %", "[70, 78]", "[65, 68]", "2.30", "6.78", "0.851", "13.4", "99 %", "3.46"),
        "600 held-out prompts (480 of them distinct)",
        # reward model
        *("84.7 % [83.6, 85.8]", "56.1 %", "87.1 %", "82.8 % [81.0, 84.5]", "6,312", "2,104", "3.1 points"),
        # answers beside each other
        *("Where does a <penguin> live?", "Sure! A penguin lives in the snow, I hope this helps!"),
        'An "owl" & a <b>bee</b>.',
        *("(said nothing)", "best reachable: 3.50", "2.01", "−2.60"),
        *("helpful", "+2.31", "truthful", "−0.80", "well formed"),
        # settings
        *("minirlhf run --seed 7", "2.13.0", "71.2 s", "rlhf.beta", "0.1234", "minirlhf chat --run good"),
    ],
)
def test_page_shows(read: Reader, shown: str) -> None:
    assert shown in read.text


def test_page_does_not_show(page: str, read: Reader) -> None:
    assert "exploited: PPO" not in read.text and "/secret/place" not in read.text
    assert read.text.count("did not end") == 1
    # What models wrote is escaped.
    assert "<script" not in page and "<penguin>" not in page and "<b>bee</b>" not in page


def test_page_is_self_contained_and_small(page: str, read: Reader) -> None:
    assert not any(text in page for text in ("http:", "https:", "@import", "<link")) and not read.all("src")
    ids, links = read.all("id"), read.all("href") + re.findall(r"url\(([^)]*)\)", page)
    assert len(ids) == len(set(ids)) and set(links) <= {f"#{name}" for name in ids}
    assert len(page.encode()) < 1_500_000


def test_plots_have_alt_text_captions_and_ranges(page: str, read: Reader) -> None:
    plots = page.count("<svg ")
    assert plots == page.count("<figcaption>") == page.count('role="img"') == 18
    assert all(len(label) > 15 for label in read.all("aria-label") if label not in ("Results", "Sections"))
    assert "healthy: 0 to 0.25" in read.text and "ceiling: gold itself 87 %" in read.text
    for step, colour in plotting.COLOURS.items():
        assert f": {colour}" not in page.split("</style>")[1], f"{step} would not follow the dark theme"


def test_written_twice_gives_equal_bytes(good: Path, page: str) -> None:
    write_report(good)
    assert (good / "report.html").read_text(encoding="utf-8") == page


def test_a_write_that_fails_leaves_the_old_page(good: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirlhf.report.page.render", lambda run: "half")

    def fail(source: Path, target: Path) -> None:
        assert Path(source).read_text() == "half" and Path(source).parent == good
        raise OSError("the disk is full")

    monkeypatch.setattr("minirlhf.checkpoints.os.replace", fail)
    with pytest.raises(OSError, match="full"):
        write_report(good)
    assert (good / "report.html").read_text(encoding="utf-8") == page
    (good / "report.html.partial").unlink()


def test_says_so_when_ppo_is_worse(tmp_path: Path) -> None:
    read = Reader(write_report(build(tmp_path / "bad", worse())).read_text(encoding="utf-8"))
    for sentence in (
        "was made worse by reinforcement learning: even the better of its two policies, PPO-ptx, is preferred to its "
        "SFT parent on only 31 % of 600 prompts",
        "PPO is worse than SFT (it wins 22 % [18, 26], mean −0.40, a gain of −1.67 [−1.76, −1.58])",
        "raised its score from 0.12 to 5.60 while the true score fell from 1.27 to −0.40",
    ):
        assert sentence in read.text
    assert "learned to follow" not in read.text


def test_says_so_when_nothing_is_sure(tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    for name in ("ppo", "ppo_ptx"):
        report["evaluation"][name] |= {"win_rate_vs_sft": 0.52, "win_rate_vs_sft_interval": [0.48, 0.56]}
    report["evaluation"]["sft"] |= {"win_rate_vs_base": 0.3, "win_rate_vs_base_interval": [0.27, 0.33]}
    report["alignment_tax"] = {"sft": 0.1, "ppo": 0.2, "ppo_ptx": 0.3, "removed_by_ptx": -0.5}
    run = load_run(build(tmp_path / "unsure", report))
    assert "gained nothing certain" in headline(run)
    told = " ".join(findings(run))
    assert "SFT model is worse than its base" in told and "PPO can’t be told from SFT" in told
    assert "PPO-ptx loses more still" in told


def test_a_proxy_is_called_a_proxy(proxy_run: Path) -> None:
    page = (proxy_run / "report.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert "gold" not in page.lower()
    assert "the very model that PPO was trained to please" in read.text
    assert "its own reward model, which is no independent judge" in read.text
    assert "reward model score (proxy)" in read.text
    assert "best reachable" not in read.text and "ceiling" not in read.text
    for null in ("None", "nan", "null"):
        assert not re.search(rf"\b{null}\b", read.text)
    assert "The base model was given, not trained here" in read.text


def test_summary_table(good: Path, proxy_run: Path) -> None:
    table = summary_table(good)
    lines = table.splitlines()
    assert re.match(
        r"PPO-ptx +1\.94 ± 0\.05 +65 % \[63, 66\] +95 % \[92, 98\] +69 % \[65, 73\] +6\.78 +0\.851 +13\.4 +99 %$",
        lines[5],
    )
    assert lines[2].startswith("base ") and lines[3].startswith("SFT ") and lines[4].startswith("PPO ")
    assert len({len(line) for line in lines[:6]}) == 1
    assert "accuracy 85 % [83, 86] (ceiling 87 %, length alone 56 %) on 6,312 held-out pairs" in table
    assert "pairs; held-out labelers 83 % [81, 85]" in table and "[95 % interval, in percent]" in table
    assert lines[-1].startswith("time: 3 min 41 s (preparation 3 s, base 71 s")

    table = summary_table(proxy_run)
    assert "gold" not in table and "proxy ± s.e." in table and "a proxy, not the truth" in table
    assert "ceiling –" in table and "nan" not in table and "None" not in table


def test_unfinished_or_damaged_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="finish the run first"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        summary_table(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_numbers_as_read() -> None:
    shown = ["–", "–", "–", "0.00", "−1.50", "1,234.00"]
    assert [number(x) for x in (None, math.nan, math.inf, -0.001, -1.5, 1234.0)] == shown
    assert percent(None) == "–" and percent(0.744, 1) == "74.4 %"
    assert interval([0.7, 1.0]) == "[70, 100]" and interval(None) == interval([math.nan, 1.0]) == ""
    assert interval([0.9952, 1.0]) == "[99, 100]" and interval([0.29, 0.57]) == "[29, 57]", "rounded outwards alone"
    assert duration(59.94) == "59.9 s" and duration(3725) == "1 h 2 min" and duration(119.7) == "2 min 0 s"
    assert parameters(1_540_000_000) == "1.5 billion parameters" and parameters(124_000_000) == "124 million parameters"


def test_only_lower_case_text_is_rewritten() -> None:
    assert readable("i lost my hat . \n can i have one ?") == "I lost my hat.\nCan I have one?"
    assert readable("Dr. Smith , i think") == "Dr. Smith , i think"
    assert readable("") == ""


def test_drawing_leaves_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plotting.style():
        figure, axes = plotting.panels(1, 2)
        plotting.curve(axes[0], [0, 1], [1.0, 2.0], "ppo", band=([0.5, 1.5], [1.5, 2.5]))
        bounds = plotting.healthy_range(axes[0], "objective/entropy", start=10.0)
        assert plotting.healthy_range(axes[0], "no/such") is None
        plotting.level(axes[1], 0.5, "coin")
    assert bounds == plotting.Range(3.0, 13.0)
    svg = plotting.to_svg(figure, "demo", 'a "quoted" <alt>')
    assert 'aria-label="a &quot;quoted&quot; &lt;alt&gt;"' in svg and "coin</text>" in svg and "<metadata" not in svg
    assert dict(matplotlib.rcParams) == before


def test_import_is_light() -> None:
    code = "import sys, minirlhf.report; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
