"""The verdict of a transfer study, its page, and the study itself."""

import contextlib
import html
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import ROOT, SMALL, tiny
from scipy import stats

from conet_jax.data import store, synthetic
from conet_jax.data.types import UserItems
from conet_jax.errors import InputError
from conet_jax.serve import showcase
from conet_jax.studies import findings, full_run, page, search, transfer, verdict, words
from conet_jax.studies.verdict import Gain

# Per-user metrics of studies whose truth is known.


def studies(count, *, users=200, seeds=5, gain=0.0, seed_noise=0.004, user_noise=0.15, rng=None):
    """(ours, theirs, control) f64[seeds, users]: users of unlike means, noise of seed and user."""
    rng = rng or np.random.default_rng(0)
    for _ in range(count):
        level = rng.gamma(2.0, 0.1, users)

        def runs(factor, level=level):
            noise = seed_noise * rng.standard_normal((seeds, 1))
            return factor * level[None] + noise + user_noise * rng.standard_normal((seeds, users))

        yield runs(1 + gain), runs(1.0), runs(1.0)


def gain_of(ours, theirs):
    return verdict.gain(ours, theirs, resamples=400)


def test_gain_is_the_ratio_of_the_means():
    ours, theirs, _ = next(studies(1, gain=0.3))
    found = gain_of(ours, theirs)
    assert found.gain == pytest.approx(ours.mean() / theirs.mean() - 1, rel=1e-12)
    assert found.difference == pytest.approx(ours.mean() - theirs.mean(), rel=1e-12)
    assert (found.users, found.seeds) == (200, 5)


def test_interval_over_users_agrees_with_scipys_paired_bootstrap():
    ours, theirs, _ = next(studies(1, seeds=1, gain=0.2))
    found = verdict.gain(ours, theirs, fixed=(True, True))
    other = stats.bootstrap(
        (ours[0], theirs[0]),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis) - 1,
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = other.high - other.low
    assert found.low == pytest.approx(other.low, abs=0.05 * width)
    assert found.high == pytest.approx(other.high, abs=0.05 * width)
    assert found.half == found.users_half and found.seeds is None


@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_over_seeds_is_students(seeds):
    """Users who are all alike: only the seeds are left, of one method."""
    means = 0.2 + 0.01 * np.random.default_rng(2).standard_normal(seeds)
    ours, theirs = np.repeat(means[:, None], 50, axis=1), np.full((1, 50), 0.2)
    found = verdict.gain(ours, theirs, fixed=(False, True), resamples=40_000)
    error = means.std(ddof=1) / np.sqrt(seeds) / 0.2
    assert found.half == pytest.approx(stats.t.ppf(0.975, seeds - 1) * error, rel=0.05)
    assert found.users_half < 1e-12


def test_interval_covers_the_truth():
    covered = 0
    for ours, theirs, _ in studies(200, gain=0.1):
        found = gain_of(ours, theirs)
        covered += found.low <= 0.1 <= found.high
    # Of 200 with 95%: 178 is four standard deviations below. Conservative with few seeds.
    assert covered >= 178


@pytest.mark.parametrize("seed_noise", [0.0, 0.004, 0.02])
def test_null_data_never_help(seed_noise):
    """No gain and no control's: either interval alone is above 0 in 2.5%, both in far fewer."""
    above = helps = 0
    for ours, theirs, control in studies(200, seed_noise=seed_noise, seeds=3):
        main, other = gain_of(ours, theirs), gain_of(ours, control)
        above += main.low > 0
        helps += verdict.decide(main, other).outcome == "helps"
    assert above <= 14 and helps <= 4  # four standard deviations above the 5 expected


def test_gain_of_which_the_sources_content_is_not_the_cause_does_not_count_as_help():
    """The recipe beats the baseline, and with another user's source it does so as well."""
    outcomes = []
    for ours, theirs, _ in studies(20, gain=0.5, users=1000, seed_noise=0.002):
        rng = np.random.default_rng(len(outcomes))
        control = ours + 0.02 * rng.standard_normal(ours.shape)
        outcomes.append(verdict.decide(gain_of(ours, theirs), gain_of(ours, control)).outcome)
    assert outcomes.count("not its content") >= 18, outcomes


def test_a_gain_that_would_have_been_seen_is_seen_in_four_of_five():
    """Of methods without a seed; with seeds, whose interval is a wide one, in more."""
    fixed, rng = {"fixed": (True, True), "resamples": 400}, np.random.default_rng(5)
    ours, theirs, _ = next(studies(1, users=400, seeds=1))
    detectable = verdict.gain(ours, theirs, **fixed).detectable
    seen = [
        verdict.gain(ours, theirs, **fixed).low > 0
        for ours, theirs, _ in studies(200, users=400, seeds=1, gain=detectable, rng=rng)
    ]
    assert 0.7 <= np.mean(seen) <= 0.9, np.mean(seen)


def test_detectable_gain_is_the_paired_tests():
    """(z(97.5%) + z(80%)) standard errors of the paired difference, over the other's mean."""
    ours, theirs, _ = next(studies(1, users=5000, seeds=1))
    found = verdict.gain(ours, theirs, fixed=(True, True))
    error = (ours[0] - theirs[0]).std(ddof=1) / np.sqrt(5000) / theirs.mean()
    assert found.detectable == pytest.approx(
        (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * error, rel=0.05
    )


def a_gain(low, high, *, seeds=5, detectable=0.02):
    middle = (low + high) / 2
    return Gain(middle, low, high, middle / 5, (high - low) / 2, 0.0, detectable, 1000, seeds)


YES, NO, WIDE = a_gain(0.09, 0.15), a_gain(-0.01, 0.01), a_gain(-0.2, 0.4, detectable=0.4)


@pytest.mark.parametrize(
    ("main", "control", "outcome"),
    [
        (YES, YES, "helps"),
        (YES, NO, "not its content"),
        (YES, WIDE, "unsettled"),
        (YES, None, "unsettled"),
        (a_gain(0.09, 0.15, seeds=2), YES, "unsettled"),
        (YES, a_gain(0.09, 0.15, seeds=1), "unsettled"),
        (NO, YES, "none"),
        (NO, None, "none"),
        (WIDE, YES, "unsettled"),
        (a_gain(-0.2, -0.1), NO, "hurts"),
        (a_gain(-0.2, -0.1, seeds=1), NO, "unsettled"),
        (a_gain(0.0, 0.02), YES, "none"),
        (Gain(None, None, None, 0.1, np.inf, np.inf, None, 9, 5), YES, "unsettled"),
    ],
)
def test_outcomes(main, control, outcome):
    found = verdict.decide(main, control)
    assert found.outcome == outcome
    assert bool(found.reasons) == (outcome == "unsettled")


def test_more_seeds_are_asked_for_only_while_they_are_of_use():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 0.1, (1, 500)).repeat(3, axis=0)
    far = base + np.array([[-0.05], [0.0], [0.05]])
    assert not gain_of(far, base).narrow  # seeds differ
    assert gain_of(base * rng.uniform(0, 2, 500)[None], base).narrow  # users do
    assert not gain_of(base[:2], base).narrow  # too few


def test_groups_are_those_of_their_users():
    rng = np.random.default_rng(1)
    ours, theirs = rng.uniform(size=(2, 3, 300))
    degrees = rng.integers(0, 40, 300)
    rows = verdict.by_target(ours, theirs, degrees)
    assert [row["interactions"] for row in rows] == ["0", "1", "2", "3-4", "5-9", "10-19", "20+"]
    assert sum(row["users"] for row in rows) == 300
    inside = (degrees >= 5) & (degrees < 10)
    row = rows[4]
    assert row["gain"]["gain"] == pytest.approx(
        ours[:, inside].mean() / theirs[:, inside].mean() - 1
    )
    assert row["ours"] == pytest.approx(ours[:, inside].mean())


# The control's data.


def test_another_users_source_keeps_all_but_whose_it_is():
    data, _ = synthetic.dataset(**SMALL)
    other = transfer.other_source(data)

    def lists(pairs):
        return [tuple(x) for x in np.split(pairs.indices, pairs.indptr[1:-1])]

    before, after = lists(data.source), lists(other.source)
    assert sorted(before) == sorted(after)
    same = sum(a == b for a, b in zip(before, after, strict=True))
    assert same <= before.count(max(before, key=before.count))  # but for users with equal lists
    assert other.meta["hash"] != data.meta["hash"]
    assert other.target is data.target
    assert all((np.diff(x) > 0).all() for x in map(np.array, after) if len(x) > 1)


def test_users_without_a_source_stay_so():
    data, _ = synthetic.dataset(**SMALL)
    indptr = data.source.indptr.copy()
    indptr[51:] = indptr[50]  # the last ten are of the target alone
    source = UserItems(indptr, data.source.indices[: indptr[50]], data.source.num_items)
    counts = {**data.meta["counts"], "target_only_users": 10}
    data = data._replace(source=source, meta=data.meta | {"counts": counts})
    assert (np.diff(transfer.other_source(data).source.indptr)[50:] == 0).all()


# The page.


def canned(outcome="helps", **changes):
    """A report as a study writes it, by hand."""
    gain = verdict.as_json(YES)
    spread = {"mean": 0.21, "std": 0.002}
    metrics = {"hit_ratio": spread, "ndcg": spread, "mrr": {"mean": 0.2, "std": None}}
    rows = [
        {"interactions": name, "users": 900, "ours": 0.2, "theirs": 0.1, "gain": gain}
        for name in ("1", "2", "3-4")
    ]
    methods = [
        {
            "method": name,
            "says": f"what {name} is",
            "knows_source": name not in ("ials", "popularity"),
            "trials": 8,
            "seeds": 5,
            "fixed": False,
            "chosen": {},
            "valid": 0.2,
            "parameters": 9,
            "warm": metrics,
            "published": metrics,
            "gain": None if name == "ials" else gain,
        }
        for name in ("popularity", "ials", "recipe", "recipe_other")
    ]
    domain = {"count": 30, "items": [f"i{n}" for n in range(12)]}
    report = {
        "format": 1,
        "names": {"target": "books", "source": "movies"},
        "k": 10,
        "data": {
            "hash": "0123456789abcdef",
            "users": 5000,
            "test_users": 4000,
            **{f"{d}_{x}": 9000 for d in ("target", "source") for x in ("items", "interactions")},
        },
        "verdict": {
            "outcome": outcome,
            "baseline": "ials",
            "main": gain,
            "published": gain,
            "control": gain,
            "joined": gain,
            "whom": "most for users with 1 training item in books",
            "unsettled": [],
            "why": [],
        },
        "methods": methods,
        "failures": {},
        "groups": {"target": rows, "source": rows, "target_only": gain},
        "carried": {
            "crossing": [
                {"way": way, "ndcg": 0.2, "gain": None if way == "on" else gain}
                for way in ("on", "off", "other")
            ],
            "seeds": 3,
            "matrices": [
                {
                    "name": "H_0_0",
                    "shape": [2, 2],
                    "zeros": 0.25,
                    "mean_abs": 0.1,
                    "values": [[0.0, 0.1], [-0.2, 0.3]],
                }
            ],
            "items": [{"item": "m1", "share": 0.2, "users": 7}],
            "of": 200,
        },
        "examples": [
            {
                "user": "user 1",
                "held_out": "i99",
                "target": domain,
                "source": domain,
                "with": ["i99", "i3"],
                "without": None,
            }
        ],
        "beware": ["Twins: none."],
        "next": {
            "method": "recipe",
            "says": "the recipe",
            "searched": True,
            "steps": [{"what": "Train it.", "command": "python launch/train.py"}],
        },
        "times": {"seconds": 60.0, "budget": 1800.0},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        report[part] = {**report[part], field: value} if field else value
    return report


VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_asks_nothing_of_the_network():
    text = page.page(json.loads(json.dumps(canned())))
    found = Page(text)
    assert all(x.startswith(("#", "data:image/png;base64,")) for x in found.references)
    assert {x[1:] for x in found.references if x.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"https?:|@import|<script|<link", text)
    assert all(x.startswith("#") for x in re.findall(r"url\((.*?)\)", text))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert text.count("<svg") == 3
    # Pictures take their colours from the page, or else could be unseen in one of the schemes.
    assert not re.search(r"(?:fill|stroke): #(?!ffffff)", text.partition("<body>")[2])


def test_page_shows_what_users_and_items_are_called_as_text():
    bad = "<script>alert(1)</script>"
    report = canned(names={"target": bad, "source": "movies & more"})
    report["carried"]["items"][0]["item"] = bad
    report["examples"][0] |= {"user": bad, "with": [bad], "held_out": bad}
    text = page.page(report)
    assert "<script" not in text and Page(text).text.count(bad) >= 5


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("helps", "user's source; most for users with 1 training item in books"),
        ("not its content", "with another user's source it does as well"),
        ("hurts", "No, movies does harm to books"),
        ("none", "a gain of 2.0% would have been seen"),
        ("unsettled", "Not settled whether movies helps books"),
    ],
)
def test_headline_says_the_outcome_with_its_interval(outcome, said):
    report = canned(outcome)
    assert said in words.headline(report) and "+12% [9.0, 15]" in words.headline(report)
    assert words.headline(report) in words.text(report)
    assert said in "".join(Page(page.page(report)).text)


def test_plain_joined_als_that_is_as_good_is_named():
    as_good = canned(verdict__joined=verdict.as_json(NO))
    assert any("is as good" in line for line in words.details(as_good))
    assert not any("is as good" in line for line in words.details(canned()))


@pytest.mark.parametrize(
    ("outcome", "said"),
    [("none", "another user's source does as well"), ("hurts", "source does as much harm")],
)
def test_a_source_that_is_no_better_than_another_user_s_is_named(outcome, said):
    level = canned(outcome, verdict__control=verdict.as_json(NO))
    assert any(said in line for line in words.details(level))
    assert not any(said in line for line in words.details(canned(outcome)))


def test_figures_as_published_are_said_where_they_are_others():
    others = canned(verdict__published=verdict.as_json(NO))
    assert any("as papers count" in line for line in words.details(others))
    assert not any("as papers count" in line for line in words.details(canned()))


def test_users_of_the_target_alone_are_told_apart():
    gains = {"low": 0.001, "gain": 0.007, "high": 0.014}, {"low": -0.1, "gain": 0.0, "high": 0.1}
    said = "a gain, by what the model has learned", "no difference that we could see"
    for found, words_ in zip(gains, said, strict=True):
        report = canned(groups__target_only={"users": 700, **found})
        (line,) = [line for line in words.details(report) if "test users of books alone" in line]
        assert words_ in line and words_ in "".join(Page(page.page(report)).text)
    without = canned(groups__target_only=None)
    assert not any("alone:" in line for line in words.details(without))


def test_nobody_is_said_to_gain_most_whose_interval_has_the_gain_of_all_in_it():
    def row(name, low, gain):
        found = {"low": low, "gain": gain, "high": 2 * gain - low}
        return {
            "interactions": name,
            "users": 900,
            "ours": 0.2 * (1 + gain),
            "theirs": 0.2,
            "gain": found,
        }

    rest = [row("2-4", 0.02, 0.05), row("5+", -0.01, 0.01)]
    assert "most for users with 1 training item" in verdict.whom([row("1", 0.10, 0.2), *rest], "x")
    found = verdict.whom([row("1", 0.08, 0.2), *rest], "books")
    assert found == "little or nothing for users with 5 or more in books"


def test_command_of_the_page_is_the_same_for_a_shell():
    command = "python launch/train.py --config.data.dir='a b' --workdir=x"
    lines = page._lines(command)
    read = subprocess.run(["sh", "-c", f"printf '%s|' {lines}"], capture_output=True, text=True)
    assert lines.count("\n") == 2 and read.stdout.split("|")[:-1] == shlex.split(command)


def test_page_of_a_study_that_failed_in_part():
    report = canned(
        "unsettled",
        failures={"lasso": "diverged"},
        groups__target_only=None,
        carried__items=[],
        carried__matrices=[],
        verdict__unsettled=["the budget of 2 min ended after 1 seed"],
        verdict__control=None,
        verdict__joined=None,
    )
    text = "".join(Page(page.page(report)).text)
    assert "lasso failed: diverged" in words.text(report)
    assert "lasso failed: diverged" in text and "The budget of 2 min ended after 1 seed." in text


# In a frame, since a window is 500 pixels wide at least; what it finds is told to the page around.
FRAME = """<!DOCTYPE html><title>none</title>
<script>onmessage = e => { document.title = JSON.stringify(e.data) }</script>
<iframe src="report.html" width="WIDTH" height="900" style="border: 0"></iframe>"""
LOOK = """<script>
addEventListener("load", () => {
  const over = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide"));
  const blank = [...document.querySelectorAll("svg, svg image")].filter(
    e => e.getBoundingClientRect().width < 20 || e.getBoundingClientRect().height < 20);
  const style = getComputedStyle(document.body);
  parent.postMessage({
    width: document.documentElement.scrollWidth,
    over: over.map(e => e.tagName + ": " + e.textContent.slice(0, 40)),
    blank: blank.length,
    colours: [style.color, style.backgroundColor],
  }, "*");
})
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to look at the page with")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_nothing_overflows_and_both_schemes_have_their_colours(width, tmp_path):
    report = canned()
    report["next"]["steps"][0]["command"] = "python launch/train.py --workdir=" + "long/" * 60
    report["examples"][0]["with"] = ["B00" * 20]
    (tmp_path / "report.html").write_text(page.page(report).replace("</body>", LOOK))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    colours = []
    for scheme in (1, 0):  # light, dark
        done = subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--enable-logging=stderr", "--virtual-time-budget=5000", "--hide-scrollbars"),
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--user-data-dir={tmp_path / 'profile'}",
                (tmp_path / "frame.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        found = json.loads(html.unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
        assert (found["width"], found["over"], found["blank"]) == (width, [], 0)
        colours.append(found["colours"])
    assert colours[0] == ["rgb(28, 32, 36)", "rgb(255, 255, 255)"]
    assert colours[1] == ["rgb(230, 233, 236)", "rgb(21, 24, 27)"]


# Studies.


def small_data(folder, **options):
    data, _ = synthetic.dataset(**(SMALL | options))
    store.save(data, folder)
    return folder


def untimed(report):
    return {name: value for name, value in report.items() if name != "times"}


def test_study_leaves_a_report_and_done_again_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "METHODS", ("recipe", "popularity"))
    monkeypatch.setattr(transfer, "MAX_TRIALS", 1)
    monkeypatch.setattr(transfer, "MAX_SEEDS", 1)
    monkeypatch.setattr(showcase, "SAMPLE", 5)
    question = transfer.Question(
        "configs/default.py",
        lambda variant: tiny(variant, epochs=1, ials_sweeps=2, fold_sweeps=1),
        {"data.dir": str(small_data(tmp_path / "data"))},
        tmp_path / "study",
        {"target": "books", "source": "movies"},
        600.0,
    )
    report = transfer.run(
        question, lambda work, done: findings.collect(work, done, showcase.showcase)
    )
    said = page.publish(report, question.workdir)
    assert "Not settled whether movies helps books" in said
    assert json.loads((question.workdir / "report.json").read_text()) == report
    Page((question.workdir / "report.html").read_text())
    methods = {row["method"]: row for row in report["methods"]}
    assert set(methods) == {"recipe", "popularity", "recipe_other"}
    for name in ("recipe", "recipe_other"):
        result = json.loads((question.workdir / name / "seed_0" / "result.json").read_text())
        assert methods[name]["warm"]["ndcg"]["mean"] == result["test_warm"]["ndcg@10"]
    assert methods["recipe"]["warm"] != methods["recipe_other"]["warm"]
    assert len(report["examples"]) == 10 and report["examples"][0]["user"] == "user 1"
    assert len(report["carried"]["matrices"]) == 2
    (trial,) = (question.workdir / "recipe" / "results").glob("*.json")
    trial = json.loads(trial.read_text())
    assert trial["valid_warm"]["ndcg@10"] == methods["recipe"]["valid"]
    assert trial["seconds"] > result["seconds"]  # with what comes before the epochs
    with monkeypatch.context() as without:
        without.setattr(full_run, "fit", None)  # nothing is left to train
        done = transfer.run(question, lambda work, done: done)
    assert done["recipe"].valid == methods["recipe"]["valid"]


def two_trials(workdir, data, monkeypatch):
    """Returns the question of a study of two methods with two trials each."""
    monkeypatch.setattr(transfer, "METHODS", ("ials", "popularity"))
    monkeypatch.setattr(transfer, "MAX_TRIALS", 2)
    return transfer.Question(
        "configs/default.py",
        lambda variant: tiny(variant, epochs=1, layers=(16, 8)),
        {"data.dir": str(data)},
        workdir,
        {"target": "books", "source": "movies"},
        600.0,
    )


def test_the_run_of_the_defaults_stays_unless_another_trial_is_better(tmp_path, monkeypatch):
    data = small_data(tmp_path / "data")
    question = two_trials(tmp_path / "study", data, monkeypatch)

    def width(name):
        config = json.loads((tmp_path / "study" / "ials" / name / "config.json").read_text())
        return config["layers"][0]

    for best, aside in ((0, False), (1, True)):
        monkeypatch.setattr(search, "best_trial", lambda trials, k, n=best: min(n, len(trials) - 1))
        work = transfer.Work(question, store.load(data))
        work.tune()
        assert work.trials == 2
        assert (tmp_path / "study" / "ials" / "defaults").exists() == aside
        assert (tmp_path / "study" / "ials" / "seed_0").exists() != aside
    assert width("defaults") == 16
    work._train_one("ials", 1)
    with monkeypatch.context() as without:
        without.setattr(full_run, "fit", None)
        work.tune()
        work._train_one("ials", 1)
    assert (width("seed_0"), width("defaults")) == (work.fields("ials")["layers"][0], 16)


def test_a_run_of_the_defaults_that_failed_half_way_is_in_no_other_trials_way(
    tmp_path, monkeypatch
):
    data = small_data(tmp_path / "data")
    question = two_trials(tmp_path / "study", data, monkeypatch)
    fit, failed = full_run.fit, []

    def fail_once(config, workdir, **options):
        found = fit(config, workdir, **options)
        if workdir.parent.name == "ials" and not failed:
            (workdir / "result.json").unlink()
            failed.append(workdir)
            raise InputError("the disk is full")
        return found

    monkeypatch.setattr(full_run, "fit", fail_once)
    monkeypatch.setattr(search, "best_trial", lambda trials, k: len(trials) - 1)
    work = transfer.Work(question, store.load(data))
    work.tune()
    assert failed == [tmp_path / "study" / "ials" / "seed_0"]
    work._train_one("ials", 1)
    assert not work.failures
    (result,) = work.runs("ials", 1).results
    assert tuple(result["config"]["layers"]) == work.fields("ials")["layers"] != (16, 8)


@pytest.mark.slow
def test_killed_at_ten_moments_a_study_comes_to_the_same_report(tmp_path):
    small_data(tmp_path / "data", num_users=90, target_interactions=800)
    code = (
        "import runpy, sys\n"
        "from conet_jax.studies import transfer\n"
        "transfer.MAX_TRIALS, transfer.MAX_SEEDS = 2, 3\n"
        f"sys.argv[0] = {str(ROOT / 'launch' / 'transfer.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def command(workdir):
        return [
            *(sys.executable, "-c", code, f"--config={ROOT / 'configs' / 'default.py'}"),
            *("--data=data", f"--workdir={workdir}", "--budget=9h", "--config.epochs=2"),
            *("--config.layers=(16,8,8,4)", "--config.ials_sweeps=2"),
        ]

    started = time.monotonic()
    whole = subprocess.run(command("whole"), cwd=tmp_path, capture_output=True, text=True)
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr
    assert "seed 2" in whole.stdout and "left out" not in whole.stdout
    killed, rng = 0, np.random.default_rng(0)
    while killed < 10:
        process = subprocess.Popen(
            command("killed"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()  # it has begun: modules are imported
        # All ten together are shorter than the whole, so that none finds it at its end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, seconds / 10))
        assert process.poll() is None, "it came to its end before ten kills"
        process.send_signal(signal.SIGKILL if killed % 2 else signal.SIGTERM)
        process.communicate()
        killed += 1
    last = subprocess.run(command("killed"), cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr

    def report(workdir):
        text = (tmp_path / workdir / "report.json").read_text()
        return untimed(json.loads(text.replace(f"{workdir}/", "study/")))

    assert report("killed") == report("whole")


def test_transfer_prepares_files_once_and_refuses_others(tmp_path):
    for name in ("books", "movies"):
        rng = np.random.default_rng(len(name))
        lines = [
            f"u{user},{name[0]}{item}"
            for user in range(30)
            for item in rng.choice(40, 8, replace=False)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["user,item", *lines]) + "\n")
    options = {"target": str(tmp_path / "books.csv"), "source": str(tmp_path / "movies.csv")}
    workdir = tmp_path / "study"
    transfer.prepare(workdir, **options, candidates=9, drop_twins=True)
    made = store.load(workdir / "data")
    assert made.meta["options"]["drop_twins"]
    (tmp_path / "books.csv").unlink()  # done again it reads nothing
    transfer.prepare(workdir, **options, candidates=9, drop_twins=True)
    with pytest.raises(InputError, match="--candidates=9 there and 8 here"):
        transfer.prepare(workdir, **options, candidates=8, drop_twins=True)
