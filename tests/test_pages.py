"""Pages of runs and comparisons: whole in one file, true to the run's own figures, drawn by a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from lightning_modules.callbacks.samples import keep
from lightning_modules.cli import leave_page
from lightning_modules.evaluation.judged_table import unbeaten
from lightning_modules.evaluation.judging import Judged
from lightning_modules.pages import charts, comparison_page
from lightning_modules.pages.charts import Line, axis, lines, points, round_step, short, thinned
from lightning_modules.pages.comparison_page import run_of
from lightning_modules.pages.page import figures, page, preformatted, section, table, upright
from lightning_modules.pages.run_page import (
    duration,
    neighbours,
    planned,
    read_metrics,
    read_run,
    run_page,
    write_run_page,
)
from recipes import compare
from tests.faults import SCRIPT
from tests.finetuning import run as recipe

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
PROBE = """<script>
const found = [...document.querySelectorAll("svg polyline, svg circle")].map(one => {
  const box = one.getBoundingClientRect(); return box.width * box.width + box.height * box.height > 0; });
const svg = document.querySelector("figure[data-points] svg");
if (svg) { const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 50})); }
const read = document.querySelector("figure[data-points] .read");
document.body.dataset.probe = JSON.stringify({drawn: found.filter(x => x).length, all: found.length,
  read: read ? read.textContent : "", wide: document.documentElement.scrollWidth > innerWidth + 1});
</script></body>"""


class Whole(HTMLParser):
    """Every tag is closed, and nothing is fetched."""

    alone = ("meta", "link", "br", "line", "polyline")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            assert name not in ("src", "href", "srcset", "action") or value.startswith("data:"), (tag, name, value)
        if tag not in self.alone:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.alone:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory, shared_cache) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("runs"), []
    for number, rate in enumerate((0.01, 0.02)):
        flags = {"data.path": corpus, "data.tokenizer": "bytes", "data.seq_len": 32, "data.batch_size": 4}
        flags |= {"trainer.max_steps": 6, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1}
        flags |= {"model.optimizer.lr": rate, "samples.max_new_tokens": 8, "samples.prompts": '["def <b>"]'}
        flags |= {"trainer.default_root_dir": folder / f"pretrain-{number}"}
        recipe("fit", *(f"--{name}={value}" for name, value in flags.items()), script=SCRIPT)
        made.append(folder / f"pretrain-{number}")
    return made


def test_a_run_ends_with_a_page_of_its_own_figures(runs):
    text, summary = (runs[1] / "report.html").read_text(), json.loads((runs[1] / "summary.json").read_text())
    Whole(text)
    for name in ("val_loss", "val_bits_per_byte"):
        assert f"<b>{summary[name]:.4f}</b>" in text
    assert f"<b>{summary['tokens']:,}</b>" in text and "pretrain-0" in text
    assert "Other than in pretrain-0" in text and "model.optimizer.lr" in text
    assert "<td>model.architecture.vocab_size" not in text  # which the data has decided
    assert "&lt;b&gt;" in text and "def <b>" not in text  # a prompt is no HTML
    shown = read_run(runs[1])
    assert shown.metrics["val/loss"][-1] == (summary["tokens"], pytest.approx(summary["val_loss_final"]))
    assert len(shown.metrics["train/loss"]) == 6
    assert [row["step"] for row in map(json.loads, (runs[1] / "samples.jsonl").read_text().splitlines())] == [2, 4, 6]
    assert [other.name for other in neighbours(runs[1])] == ["pretrain-0"]


def test_a_run_that_left_little_has_a_small_page(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,tokens\n")
    Whole(run_page(read_run(tmp_path), []))
    (tmp_path / "unusual_steps.jsonl").write_text(
        '{"step": 7, "rank": 0, "loss": "nan", "grad_norm": "inf", "rows": [3, 5]}\n'
    )
    assert "3, 5" in run_page(read_run(tmp_path), [])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(("limit", "most"), [(None, ""), (50.0, ""), (20.0, "at most ")])
def test_what_a_clock_may_cut_short_is_planned_at_most(limit, most):
    foreseen = {"steps": 10, "tokens": 640, "seconds": 40.0, "limit_seconds": limit}
    text = planned({"planned": foreseen, "measured": {"steps": 9, "tokens": 576, "seconds": 19.0}})
    assert f"<td>{most}10</td><td>9</td>" in text and f"<td>{most}640</td>" in text
    assert f"<td>{most}{'20' if most else '40'} s</td><td>19 s</td>" in text


def test_a_page_that_cannot_be_made_fails_no_run(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{")
    leave_page(tmp_path)
    assert "no report.html" in capsys.readouterr().err


def test_rows_without_tokens_stand_where_their_step_does(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,tokens,train/loss,val/loss\n9,1000,2.0,\n9,,,2.5\n14,,,2.25\n19,2000,1.5,\n"
    )
    found, _ = read_metrics(tmp_path / "metrics.csv")
    assert found["val/loss"] == [(1000, 2.5), (1500, 2.25)] and found["train/loss"] == [(1000, 2.0), (2000, 1.5)]
    (tmp_path / "steps.csv").write_text("step,val/loss\n3,2.0\n7,1.0\n")
    assert read_metrics(tmp_path / "steps.csv") == ({"val/loss": [(3, 2.0), (7, 1.0)]}, False)
    (tmp_path / "run").mkdir()
    (tmp_path / "steps.csv").rename(tmp_path / "run" / "metrics.csv")
    text = run_page(read_run(tmp_path / "run"), [read_run(tmp_path)])
    assert ">steps<" in text and ">tokens<" not in text and text.count("<polyline") == 1  # no tokens beside steps


def test_a_file_that_a_kill_cut_off_costs_nothing_else(runs, tmp_path):
    shutil.copytree(runs[1].parent, tmp_path / "runs")
    mine, other = (tmp_path / "runs" / name for name in ("pretrain-1", "pretrain-0"))
    with (mine / "samples.jsonl").open("a") as file:
        file.write('{"step": 7, "pro')
    with (mine / "metrics.csv").open("a") as file:
        file.write("9,0.")
    (other / "summary.json").write_text("{")
    text = write_run_page(mine).read_text()
    assert text.count("<polyline") >= 5 and "pretrain-0" not in text
    assert keep(mine / "samples.jsonl", [[8, "p", "x"]])[-1] == [8, "p", "x"]
    assert all(json.loads(line) for line in (mine / "samples.jsonl").read_text().splitlines())


def test_runs_of_another_kind_are_no_neighbours(runs, tmp_path):
    shutil.copytree(runs[1].parent, tmp_path / "runs")
    (tmp_path / "runs" / "pretrain-0").rename(tmp_path / "runs" / "mine")
    assert [run.name for run in neighbours(tmp_path / "runs" / "pretrain-1")] == ["mine"]
    config = tmp_path / "runs" / "mine" / "config.yaml"
    config.write_text(config.read_text().replace("CausalLM", "MaskedLM"))
    assert neighbours(tmp_path / "runs" / "pretrain-1") == []


def test_samples_of_steps_that_are_done_again_are_replaced(tmp_path):
    for step, text in ((2, "a"), (4, "b"), (6, "c"), (4, "d")):
        keep(tmp_path / "samples.jsonl", [[step, "p", text]])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["text"]) for row in rows] == [(2, "a"), (4, "d")]


# Charts


def test_a_longer_neighbour_leaves_room_for_the_run_itself():
    mine, other = Line("mine", [(0, 1.0), (100, 2.0)]), Line("other", [(0, 1.0), (90, 1.5), (9000, 3.0)], True)
    own, faint = re.findall(r'<polyline [^>]*points="([^"]+)"', lines("t", "tokens", [mine, other]))
    assert float(own.split()[-1].split(",")[0]) == pytest.approx(charts.RIGHT, abs=10)
    assert len(faint.split()) == 2


def test_a_line_is_where_its_numbers_are():
    text = lines("t", "tokens", [Line("one", [(0, 1.0), (50, 2.0), (100, 3.0)])])
    (places,) = re.findall(r'<polyline [^>]*points="([^"]+)"', text)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, place.split(",")) for place in places.split())
    assert (x0, x2) == (charts.LEFT, charts.RIGHT) and x1 == pytest.approx((x0 + x2) / 2)
    assert y0 > y1 > y2 and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)  # SVG counts downwards


def test_what_is_no_number_is_left_out_and_what_is_too_much_is_thinned():
    assert lines("t", "x", [Line("one", [(0, float("nan")), (1, 2.0)])]) == ""
    some = [(float(i), float(i % 2)) for i in range(5001)]
    found = thinned(some)
    assert len(found) <= charts.MOST_POINTS + 1 and found[-1] == some[-1]
    assert all(0.3 < b < 0.7 for _, b in found[:-1])
    assert lines("t", "x", [Line("same", [(0, 5.0), (1, 5.0)])])  # of no height


@pytest.mark.parametrize(
    ("about", "step"), [(0.9, 1), (1.1, 1), (1.7, 2), (3.4, 5), (8, 10), (0.0023, 0.002), (470, 500)]
)
def test_ticks_are_round(about, step):
    assert round_step(about) == pytest.approx(step)


def test_ticks_lie_on_the_axis_and_logarithms_at_powers():
    for values in ([0.0, 1.0], [3.1, 3.4], [-5.0, 200.0], [1e-5, 3e-5]):
        found = axis(values, False, 0, 100).ticks()
        assert 2 <= len(found) <= 8 and all(values[0] - 1e-9 <= tick <= values[1] + 1e-9 for tick in found)
    assert axis([0.1, 1000.0], True, 0, 100).ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert [short(value) for value in (0, 12, 1500, 3e6, 2e-4, 0.25)] == ["0", "12", "1.5k", "3M", "2.0e-4", "0.25"]
    assert [duration(seconds) for seconds in (59.6, 119, 150, 7500)] == ["60 s", "119 s", "2 min 30 s", "2 h 5 min"]


def test_ticks_that_lie_near_each_other_have_digits_enough():
    ticks = axis([3.2924, 3.2931], False, 0, 100).ticks()
    labels = [label for _, label in charts.labelled(ticks)]
    assert len(set(labels)) == len(ticks) >= 3 and [float(label) for label in labels] == pytest.approx(ticks, abs=1e-5)
    assert [label for _, label in charts.labelled([0.0, 0.5, 1.0])] == ["0", "0.5", "1"]


def test_a_line_beyond_the_axes_is_cut_off_and_not_bent_along_them():
    mine = Line("mine", [(0, 1.0), (100, 2.0)])
    text = lines("t", "tokens", [mine, Line("falls", [(0, 9.0), (50, 1.5), (100, 1.2)], True)])
    falls = re.findall(r'<polyline [^>]*points="([^"]+)"', text)[1]
    assert float(falls.split()[0].split(",")[1]) < charts.TOP
    inside = re.search(r"<svg x=.*?</svg>", text)[0]
    assert inside.count("<polyline") == 2 and "<polyline" not in text.replace(inside, "")
    far = Line("far", [(0, 9.0), (100, 8.0)], True)  # of which nothing would be seen
    assert "far" not in lines("t", "tokens", [mine, far])


def test_text_is_no_html():
    bad = '<script>alert("x")</script>'
    parts = [section(bad, figures([(bad, bad)]), table([bad], [[bad]]), preformatted(bad, bad))]
    parts += [lines(bad, bad, [Line(bad, [(0, 1), (1, 2)])]), points(bad, bad, bad, [(bad, (1, 2))], [])]
    text = page(bad, bad, parts)
    Whole(text)
    assert bad not in text


# Comparisons


def compared(runs: list[Path], corpus: Path, folder: Path, *more: str) -> None:
    words = [str(run) for run in runs] + ["--data.path", str(corpus), "--data.val_fraction", "0.5"]
    compare.main([*words, "--output", str(folder), *more])


def test_models_stand_beside_each_other_with_intervals(runs, corpus, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text(
        "sent_more,sent_less,bias_type\n" + "".join(f"he is x{i},she is x{i},gender\n" for i in range(8))
    )
    compared(runs, corpus, tmp_path / "out", "--contrasts", str(tmp_path / "pairs.csv"), "--x", '["parameters"]')
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    first, second = (found[str(run)] for run in runs)
    assert {"bits_per_byte", "calibration_error", "token_accuracy", "prefers_stereotype", "token_ms"} <= first.keys()
    assert {"kl", "same_top"} <= second.keys() and "kl" not in first
    assert second["kl"] > 0 and 0 < second["same_top"] <= 1 and "bias_change_low" in second
    text = (tmp_path / "out" / "compare.html").read_text()
    Whole(text)
    assert "Bits per byte by parameters" in text and "model.optimizer.lr" in text
    shown = capsys.readouterr()
    assert "calibration error" in shown.out and "held out; --data.val_path judges by a text as a whole" in shown.err
    assert shown.out.splitlines()[0].split() == [str(run) for run in runs]  # so wide a table is turned


def test_a_model_beside_itself_is_the_same(runs, corpus, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    compared([runs[0], copy], corpus, tmp_path / "out")
    compared([runs[0], runs[0] / "model"], corpus, tmp_path / "once")
    text = (tmp_path / "once" / "compare.html").read_text()
    assert text.count("<polyline") == (tmp_path / "out" / "compare.html").read_text().count("<polyline") / 2
    first, second = json.loads((tmp_path / "out" / "compare.json").read_text()).values()
    assert second["kl"] == 0 and second["same_top"] == 1
    assert second["bits_per_byte"] == first["bits_per_byte"]
    assert second.get("excess_low", 0.0) == second.get("excess_high", 0.0) == 0.0


def test_mistakes_are_one_line(runs, corpus, tmp_path, capsys):
    for words, said in (
        ([runs[0], runs[0]], "is there twice"),
        ([tmp_path / "none"], "no such folder"),
        ([runs[0], "--contrasts", tmp_path / "none.csv"], "no such file or folder: --contrasts"),
        ([runs[0], "--y", "beauty"], "beauty is no figure of a model; figures are bits_per_byte, "),
        ([runs[0], "--x", "parameter"], "parameter is no figure of a model; did you mean parameters?"),
        (
            [runs[0], "--y", "mse", "--data.path", corpus, "--data.val_fraction", "0.5"],
            "mse is a figure of none of them",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main([str(word) for word in words])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and said in error


def test_a_damaged_file_beside_a_model_costs_its_curves_alone(runs, tmp_path, capsys):
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    assert run_of(str(tmp_path / "run")) is None and "damaged" in capsys.readouterr().err
    assert run_of(str(runs[0])).name == "pretrain-0"


def judged(name: str, **figures: float) -> Judged:
    return Judged(name, figures, metric="mse", more_is_better=False)


@pytest.mark.parametrize(
    ("cost", "quality", "best"),
    [
        ("bytes", "prefers_stereotype", ["a", "c"]),  # of which a half is the best
        ("bytes", "token_ms", ["a", "b"]),
        ("token_ms", "same_top", ["b", "a"]),
        ("bytes", "mse", ["a", "c"]),
    ],
)
def test_nothing_beats_what_is_better_in_what_is_wanted(cost, quality, best):
    found = [
        judged("a", bytes=1, prefers_stereotype=0.3, token_ms=5, same_top=0.9, mse=3),
        judged("b", bytes=2, prefers_stereotype=0.1, token_ms=2, same_top=0.8, mse=9),
        judged("c", bytes=3, prefers_stereotype=0.52, token_ms=9, same_top=0.7, mse=1),
    ]
    assert [one.name for one in unbeaten(found, cost, quality)] == best


def test_pseudo_likelihood_is_drawn_beside_no_likelihood():
    found = [judged(name, bytes=1, bits_per_byte=bits) for name, bits in (("a", 2.0), ("b", 1.5), ("masked", 0.5))]
    found[2].kind = "masked"
    colors = {"a": "red", "b": "green", "masked": "blue"}
    text = comparison_page.scatter(found, "bytes", "bits_per_byte", colors)
    assert text.count("<circle") == 2 and "masked" not in text and 'fill="green"' in text
    assert comparison_page.scatter(found, "bits_per_byte", "bytes", colors).count("<circle") == 3


def test_few_models_are_columns_and_many_are_rows():
    few, many = ([["", "x", "y"], *([str(i), "1", "2"] for i in range(count))] for count in (2, 9))
    assert upright(few) == (("", "0", "1"), [("x", "1", "1"), ("y", "2", "2")])
    assert upright(many) == (many[0], many[1:])


def test_contrasts_are_spread_evenly(tmp_path):
    text = "".join(f"he {i},she {i},gender\n" for i in range(10))
    (tmp_path / "pairs.csv").write_text("sent_more,sent_less,bias_type\n" + text)
    found = compare.read_contrasts(tmp_path / "pairs.csv", 7)
    assert [pair.more for pair in found] == [f"he {i}" for i in (0, 1, 2, 4, 5, 7, 8)]
    assert len(compare.read_contrasts(tmp_path / "pairs.csv", 50)) == 10


# In a browser


def in_browser(file: Path, folder: Path, width: int) -> dict:
    """What a probe finds in the page, which fails on any error that the page logs."""
    (folder / "probed.html").write_text(file.read_text().replace("</body>", PROBE))
    words = [BROWSER, *ALONE, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=2000", "--dump-dom", (folder / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'data-probe="([^"]+)"', done.stdout)
    return json.loads(found.replace("&quot;", '"'))


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_the_pages_and_reads_points_out(width, runs, corpus, tmp_path):
    found = in_browser(runs[1] / "report.html", tmp_path, width)
    assert found["drawn"] == found["all"] >= 10
    assert re.match(r"tokens [\d,]+:  held out \d", found["read"]) and not found["wide"]
    compared(runs, corpus, tmp_path / "out")
    beside = in_browser(tmp_path / "out" / "compare.html", tmp_path, width)
    assert beside["drawn"] == beside["all"] >= 8 and not beside["wide"]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_an_error_in_a_page_is_seen(tmp_path):
    (tmp_path / "bad.html").write_text("<body><script>undefinedFunction()</script></body>")
    with pytest.raises(AssertionError, match="undefinedFunction"):
        in_browser(tmp_path / "bad.html", tmp_path, 500)


def test_settings_of_a_page_are_those_of_the_run(runs):
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert read_run(runs[0]).config == config
    assert write_run_page(runs[0]).read_text().count("<h2>") >= 4
