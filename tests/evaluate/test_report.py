"""The report page: complete, self-contained, and deaf to what policies and tools write."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from hdpo_jax.evaluate import report_trajectories
from hdpo_jax.evaluate.report import render, script_safe_json, write_report
from hdpo_jax.evaluate.report_curves import charts_of, moving
from hdpo_jax.evaluate.report_data import collect, wilson_interval
from hdpo_jax.evaluate.report_trajectories import ImageTable, choose_pairs, group_items, outcomes

HOSTILE = (
    "</script><script>document.title='owned'</script><!--<script><img src=x onerror=\"document.title='owned'\">{{data}}"
)


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def rendered_by_chromium(path: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM after its script ran, and what the browser logged to the console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [browser, *flags, f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    command += ["--window-size=1280,2400", "--dump-dom", path.as_uri()]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    console = "\n".join(line for line in outcome.stderr.splitlines() if "CONSOLE" in line)
    return outcome.stdout, console


def test_quickstart_page_tells_the_result(quickstart_run: Path):
    path = write_report(quickstart_run)
    assert path == quickstart_run / "report.html"
    data = page_data(path.read_text())
    summary = json.loads((quickstart_run / "summary.json").read_text())
    tiles = {tile["label"]: (tile["before"], tile["after"]) for tile in data["tiles"]}
    assert tiles["Redundant calls"] == (summary["cold_start"]["redundant_tool_rate"], 0.0)
    assert tiles["Right answers"] == (summary["cold_start"]["accuracy"], summary["hdpo"]["accuracy"])
    assert "after HDPO on 0 %" in data["lede"]
    titles = [chart["title"] for section in data["sections"] for chart in section["charts"]]
    assert {"Redundant and needed calls", "Rewards", "Loss", "Gradient norm", "Seconds a step"} <= set(titles)
    assert ("Compilations after warm-up", "0") in [tuple(fact) for fact in data["facts"]]
    first = data["browser"]["items"][0]
    assert [column["label"] for column in first["columns"]] == ["Cold start", "HDPO"]
    assert first["facets"]["prompt"] == "legible"
    # A prompt's image stands on the page once, though both columns and two dumps name it.
    assert len(data["images"]) == len(set(data["images"]))


def test_page_asks_for_nothing_outside_itself(quickstart_run: Path):
    page = write_report(quickstart_run).read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|iframe|base|object)\b|\bfetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", page)


def test_policy_allows_only_the_page_s_own_script_and_style(quickstart_run: Path):
    page = write_report(quickstart_run).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    for kind in ("script", "style"):
        body = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in html.unescape(policy[1])
    assert "default-src 'none'" in html.unescape(policy[1])
    assert "unsafe" not in policy[1]


def hostile_run(run_dir: Path, make_record: Callable[..., dict[str, Any]]) -> Path:
    record = make_record(
        prompt_id=HOSTILE,
        question=HOSTILE,
        ground_truth=[HOSTILE, "x"],
        data_source=HOSTILE,
        extra={},
        stop=HOSTILE,
        prompt_images=["https://example.org/x.png", "javascript:alert(1)", 'data:image/png;base64,AA"onload="x'],
        turns=[
            {"role": "assistant", "text": f"<answer>{HOSTILE}</answer>", "images": []},
            {"role": "tool", "text": HOSTILE, "images": ["data:image/svg+xml;base64,PHN2Zz4="]},
        ],
    )
    (run_dir / "rollouts").mkdir(parents=True)
    (run_dir / "rollouts" / "step_1.jsonl").write_text(json.dumps(record) + "\n")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, f"odd/{HOSTILE}": 0.5, "reward/correct": 1.0}) + "\n")
    return run_dir


def test_hostile_text_stays_text(tmp_path: Path, make_record: Callable[..., dict[str, Any]]):
    page = write_report(hostile_run(tmp_path / "<b>run</b>", make_record)).read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<!--" not in page and "<b>run" not in page
    data = page_data(page)
    item = data["browser"]["items"][0]
    assert item["question"] == HOSTILE
    assert item["columns"][0]["turns"][1]["text"] == HOSTILE
    # Only data URIs of bitmaps become images: a URL is a request, and an SVG may carry script.
    assert data["images"] == [] and item["images"] == [] and item["columns"][0]["turns"][1]["images"] == []


@pytest.mark.requires_chromium
def test_browser_shows_hostile_text_and_runs_none_of_it(tmp_path: Path, make_record: Callable[..., dict[str, Any]]):
    path = write_report(hostile_run(tmp_path / "run", make_record))
    dom, console = rendered_by_chromium(path, tmp_path / "profile")
    assert "<title>run</title>" in dom
    assert html.escape(HOSTILE, quote=False) in dom
    assert console == ""


@pytest.mark.requires_chromium
def test_browser_draws_the_page(quickstart_run: Path, tmp_path: Path):
    dom, console = rendered_by_chromium(write_report(quickstart_run), tmp_path / "profile")
    assert console == ""
    assert dom.count('class="plot"') >= 12
    assert re.search(r'<text[^>]*class="label filled tone-tool"[^>]*>redundant 0', dom)
    assert dom.count('role="option"') == len(collect(quickstart_run)["browser"]["items"])
    assert 'aria-selected="true"' in dom


@pytest.mark.requires_chromium
def test_browser_filters_and_follows_keys(quickstart_run: Path, tmp_path: Path):
    page = write_report(quickstart_run).read_text()
    act = """
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
      const buttons = [...document.querySelectorAll(".facet button")];
      const chosen = () => document.querySelector('[aria-selected="true"] .name').firstChild.textContent;
      const seen = [document.querySelectorAll(".row").length, chosen()];
      press("j"); press("j"); seen.push(chosen());
      press("k"); seen.push(chosen());
      buttons.find((each) => each.textContent === "illegible").click();
      seen.push(document.querySelectorAll(".row").length, chosen());
      press("r"); seen.push(document.querySelector(".column pre").textContent.slice(0, 8));
      document.title = JSON.stringify(seen);
    """
    # Only this copy may run a script of ours: without its policy.
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{act}</script></body>")
    path = tmp_path / "page.html"
    path.write_text(page)
    dom, console = rendered_by_chromium(path, tmp_path / "profile")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None and console == ""
    truths = [item["truth"] for item in collect(quickstart_run)["browser"]["items"]]
    # Every other sign is illegible; the one chosen by then, the second, is among them and stays.
    expected = [24, truths[0], truths[2], truths[1], 12, truths[1], "<reason>"]
    assert json.loads(html.unescape(title[1])) == expected


def test_training_run_page_compares_first_and_last_steps(training_run: Path):
    data = page_data(write_report(training_run).read_text())
    assert data["title"] == "run-7"
    assert data["sides"] == ["First 6 steps", "Last 6 steps"]
    assert [tile["label"] for tile in data["tiles"]][:2] == ["Right answers", "Rollouts that call a tool"]
    assert {item["facets"]["step"] for item in data["browser"]["items"]} == {"10", "20", "60"}
    assert {item["facets"]["group"] for item in data["browser"]["items"]} >= {"all wrong", "all right"}
    assert len(data["browser"]["items"][0]["columns"]) == 8
    assert ["Weight of the efficiency loss", "0.15"] in data["facts"]


def test_supervised_run_page_needs_neither_rollouts_nor_config(tmp_path: Path):
    lines = [{"step": step, "loss/total": 1.0 / step, "time/step": 0.5} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = page_data(write_report(tmp_path).read_text())
    assert [(tile["label"], tile["before"], tile["after"]) for tile in data["tiles"]] == [("Loss", 1.0, 0.125)]
    assert data["browser"]["items"] == []


def test_quickstart_page_without_evaluation_dumps(quickstart_run: Path):
    shutil.rmtree(quickstart_run / "evaluation")
    data = page_data(write_report(quickstart_run).read_text())
    assert len(data["tiles"]) == 3 and data["browser"]["items"] == []


def test_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="neither summary.json nor metrics.jsonl"):
        write_report(tmp_path)


def test_gaps_and_surplus_metrics_are_drawn_too():
    records = [
        {"step": 1, "loss/total": 2.0, "policy/entropy": None},
        {"step": 2, "loss/total": None, "policy/entropy": 0.5},
    ]
    charts, rest = charts_of(records)
    assert [chart["title"] for chart in charts] == ["Loss"]
    assert charts[0]["lines"][0]["steps"] == [1]
    assert [(chart["title"], chart["lines"][0]["raw"]) for chart in rest] == [("policy/entropy", [0.5])]


def test_long_curves_keep_their_ends():
    charts, _ = charts_of([{"step": step, "reward/correct": 0.5} for step in range(1, 5_001)])
    steps = charts[0]["lines"][0]["steps"]
    assert len(steps) == 500 and steps[0] == 1 and steps[-1] == 5_000


def test_moving_mean_is_centred():
    # A trailing mean would instead give [1, 1.5, 4, 8].
    assert moving(fmean, [1.0, 2.0, 6.0, 10.0], 1) == [1.5, 3.0, 6.0, 8.0]
    assert moving(fmean, [3.0, 5.0], 0) == [3.0, 5.0]


def test_the_step_that_compiles_does_not_bend_the_time_curve():
    charts, _ = charts_of([{"step": step, "time/step": 12.5 if step == 1 else 0.5} for step in range(1, 101)])
    # A moving mean would instead start at 2.5.
    assert charts[0]["lines"][0]["smooth"][0] == 0.5


def test_wilson_interval_of_none_in_thirty():
    # z²/(n + z²) = 3.8416 / 33.8416 = 0.1135; the normal interval would instead claim exactly 0.
    low, high = wilson_interval(0.0, 30)
    assert low == 0.0
    assert high == pytest.approx(0.11352, abs=1e-5)


def test_shown_pairs_are_evenly_spread_and_say_so(
    tmp_path: Path, make_record: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report_trajectories, "PAIRS", 4)
    monkeypatch.setattr(report_trajectories, "MISTAKES", 2)
    path = tmp_path / "dump.jsonl"
    records = [make_record(prompt_id=f"p{i}", correct=i not in (1, 2, 3, 5)) for i in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    cases = outcomes(path)
    keys, phrase = choose_pairs(cases, cases)
    # Every third is 0, 3, 6, 9; of the wrong ones among the others (1, 2, 5) the first two.
    assert sorted(keys) == [(f"p{i}", 0) for i in (0, 1, 2, 3, 6, 9)]
    assert phrase == "1 in 3 of 10 held-out prompts, evenly spread, and 2 more that HDPO gets wrong"


def test_a_group_that_could_not_be_judged_is_not_called_wrong(
    tmp_path: Path, make_record: Callable[..., dict[str, Any]]
):
    path = tmp_path / "dump.jsonl"
    verdicts = {0: (True, False), 1: (False, False), 2: (False, None)}
    records = [
        make_record(group=group, sample=sample, correct=correct, rewards=None)
        for group, pair in verdicts.items()
        for sample, correct in enumerate(pair)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    items, _ = group_items([(7, path)], ImageTable())
    assert [item["facets"]["group"] for item in items] == ["mixed", "all wrong", "not judged"]
    assert [column["correct"] for column in items[2]["columns"]] == [False, None]


def test_image_table_holds_each_image_once():
    images = ImageTable()
    assert [
        images.add(uri) for uri in ("data:image/png;base64,AA==", "http://x", None, "data:image/png;base64,AA==")
    ] == [
        0,
        None,
        None,
        0,
    ]
    assert images.uris == ["data:image/png;base64,AA=="]


def test_script_safe_json_has_no_markup_and_loses_nothing():
    text = script_safe_json({"a": HOSTILE + "\u2028&amp;"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": HOSTILE + "\u2028&amp;"}


def test_render_does_not_expand_marks_inside_values(quickstart_run: Path):
    data = collect(quickstart_run) | {"title": "{{script}}"}
    assert "<title>{{script}}</title>" in render(data)
