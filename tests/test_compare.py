"""The comparison of methods: what it plans, chooses, reports and keeps, and a small one from beginning to end."""

import importlib.util
import json
import math
import sys
import time
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # its files import each other, as scripts do

import compare
from compare_plan import GRIDS, Plan, Settings, best_peers, half_decade, plan, steps_within
from compare_pool import Pool, Timing
from compare_report import draw, entries, table
from compare_rows import Row, Run, append_row, choose, edge, mean_dev_losses, read_rows, save_curve
from compare_run import measure

FIGURES = {"steps": 1, "device": "cpu", "seconds": 2.0, "model": "model", "precision": "32-true"}
RATES = {"a": (1e-5, 3e-5, 1e-4), "b": (1e-3, 3e-3, 1e-2), "first_order": (1e-4, 3e-4), "adanaged": ()}


def row(run: Run, dev: float, test: float | None = None) -> Row:
    losses = {"dev_loss": dev, "test_loss": dev if test is None else test, "last_test_loss": dev}
    accuracies = dict.fromkeys(("dev_acc", "test_acc", "last_test_acc"), 0.5 if math.isfinite(dev) else math.nan)
    spent = {"forwards": run.budget, "diverged": not math.isfinite(dev)}
    return Row(**vars(run), **losses, **accuracies, **FIGURES, **spent)


def at(rate: float | None, dev: float, seed: int = 0, method: str = "a", test: float | None = None) -> Row:
    return row(Run("one", "sst2", method, rate, seed, 2000), dev, test)


def settings(**changes) -> Settings:
    return replace(Settings(["adanaged", "a", "b", "first_order"], ["sst2", "rte"], grids=RATES), **changes)


def finish(asked: Settings, dev, rows: list[Row] | None = None) -> list[Row]:
    """All rows that the plan leads to, with the dev loss of each run."""
    rows = list(rows or [])
    while missing := plan(asked, rows).now:
        rows.append(row(missing[0], dev(missing[0])))
    return rows


def nearest(best: dict[str, float]):
    """A dev loss that is lowest at one rate of each method."""
    return lambda run: 0.5 if run.rate is None else 0.4 + round(abs(math.log10(run.rate / best[run.method])), 4)


# ---- steps and rates ---------------------------------------------------------------------------------------------------
def test_steps_of_a_budget():
    assert steps_within(2000, 2.0) == 1000
    assert steps_within(2000, 3.0) == 666
    assert steps_within(10, 5.0) == 2
    assert steps_within(8, 25.0) == 1
    assert steps_within(8000, 2.1, calibration=60) == 3780


@pytest.mark.parametrize("rate", [1e-7, 3e-7, 1e-5, 3e-5, 1.0, 3.0, 300.0])
def test_half_decades_go_up_and_down(rate):
    assert half_decade(half_decade(rate, 1), -1) == rate
    assert half_decade(half_decade(rate, 1), 1) == pytest.approx(10 * rate)
    assert half_decade(2e-4, 1) == 6.3e-4


def test_grids_are_half_decades():
    for rates in GRIDS.values():
        assert all(half_decade(low, 1) == high for low, high in pairwise(rates))
        assert len(rates) in (0, 3)


# ---- choosing ----------------------------------------------------------------------------------------------------------
def test_the_choice_is_by_dev_loss_over_the_seeds_that_all_have():
    rows = [at(1e-5, 0.6, test=0.1), at(3e-5, 0.5, test=0.9)]
    assert choose(rows) == 3e-5
    rows += [at(3e-5, 0.9, seed=1), at(3e-5, 0.9, seed=2)]
    assert mean_dev_losses(rows) == {1e-5: 0.6, 3e-5: 0.5}
    rows.append(at(1e-5, 0.6, seed=1))
    assert mean_dev_losses(rows) == {1e-5: 0.6, 3e-5: pytest.approx(0.7)}
    assert choose(rows) == 1e-5
    assert choose([at(None, 0.6)]) is None
    assert choose([at(1e-5, math.inf), at(1e-4, 3.0)]) == 1e-4


def test_edges():
    losses = {1e-5: 0.5, 3e-5: 0.6, 1e-4: 0.7}
    assert edge([at(rate, loss) for rate, loss in losses.items()]) == -1
    assert edge([at(rate, -loss) for rate, loss in losses.items()]) == 1
    assert edge([at(rate, loss) for rate, loss in zip(losses, (0.7, 0.5, 0.6), strict=True)]) == 0
    assert edge([at(1e-5, 0.5)]) == 0
    assert edge([at(None, 0.5)]) == 0


# ---- the plan ----------------------------------------------------------------------------------------------------------
def test_stage_one_is_the_grid_of_all_methods():
    planned = plan(settings(), [])
    assert [run.task for run in planned.now if run.method == "zero_shot"] == ["sst2", "rte"]
    one = [run for run in planned.now if run.stage == "one"]
    assert [(run.method, run.rate) for run in one] == [(m, r) for m in settings().methods for r in RATES[m] or (None,)]
    assert {(run.task, run.seed, run.budget) for run in one} == {("sst2", 0, 2000)}
    # two peers, of which only the number is known: three rates and two more seeds on two tasks
    assert len(planned.later) == 2 * 2 * 5
    assert plan(settings(stages=("one",)), []).later == []


def test_a_best_rate_at_the_edge_is_followed_at_most_twice():
    asked = settings(stages=("one",))
    rows = finish(asked, nearest({"a": 1e-8, "b": 3e-2, "first_order": 3e-4}))
    tried = {method: sorted(row.rate for row in rows if row.method == method and row.rate) for method in asked.methods}
    assert tried["a"] == [1e-6, 3e-6, 1e-5, 3e-5, 1e-4]
    assert tried["b"] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert tried["first_order"] == [1e-4, 3e-4, 1e-3]
    assert len(finish(replace(asked, extend=()), nearest({"a": 1e-8, "b": 3e-2, "first_order": 3e-4}))) == 2 - 1 + 9


def test_stage_two_chooses_with_the_first_seed_and_repeats_with_the_others():
    best = {"a": 3e-5, "b": 3e-3, "first_order": 3e-4}
    rows = finish(settings(), nearest(best))
    two = [row for row in rows if row.stage == "two"]
    assert {row.method for row in two} == {"adanaged", "a", "b"}
    for task in ("sst2", "rte"):
        own = [row for row in two if row.task == task]
        assert sorted(row.seed for row in own if row.method == "adanaged") == [0, 1, 2]
        peer = [(row.rate, row.seed) for row in own if row.method == "a"]
        assert sorted(peer) == [(1e-5, 0), (3e-5, 0), (3e-5, 1), (3e-5, 2), (1e-4, 0)]
    assert {row.budget for row in two} == {8000}


@pytest.mark.parametrize(("neighbours", "tried"), [(0, [3e-5]), (2, [3e-6, 1e-5, 3e-5, 1e-4, 3e-4])])
def test_stage_two_tries_as_many_rates_as_asked(neighbours, tried):
    asked = settings(neighbours=neighbours)
    assert len(plan(asked, []).later) == 2 * 2 * (len(tried) + 2)
    rows = finish(asked, nearest({"a": 3e-5, "b": 3e-3, "first_order": 3e-4}))
    for task in ("sst2", "rte"):
        peer = [row for row in rows if row.stage == "two" and row.task == task and row.method == "a"]
        assert sorted(row.rate for row in peer if row.seed == 0) == tried
        assert [row.rate for row in peer if row.seed] == [3e-5, 3e-5]


def test_stage_two_takes_the_best_three_that_did_not_diverge():
    names = ["adanaged", "p", "q", "r", "s", "first_order"]
    asked = Settings(names, ["sst2"], grids=dict.fromkeys(names[1:], (1e-3,)), stages=("one",), extend=())
    rows = finish(asked, lambda run: {"p": 0.7, "q": 0.5, "r": 0.6, "s": 0.65}.get(run.method, 0.1))
    assert list(best_peers(asked, rows)) == ["q", "r", "s"]
    rows = finish(asked, lambda run: {"p": 0.7, "q": math.inf, "r": 0.6, "s": math.inf}.get(run.method, 0.1))
    assert list(best_peers(asked, rows)) == ["r", "p"]


def test_what_is_done_is_not_planned_again(tmp_path):
    best = nearest({"a": 3e-5, "b": 3e-3, "first_order": 3e-4})
    rows = finish(settings(), best)
    assert plan(settings(), rows) == Plan([], [])
    for kept in range(0, len(rows), 5):
        assert len(plan(settings(), rows[:kept]).now) <= len(rows) - kept
        assert {row.key for row in finish(settings(), best, rows[:kept])} == {row.key for row in rows}
        for each in rows[kept : kept + 5]:
            append_row(tmp_path / "runs.csv", each)
    assert read_rows(tmp_path / "runs.csv") == rows
    assert plan(settings(), read_rows(tmp_path / "runs.csv")).now == []
    assert len(plan(settings(seeds=(0, 1, 2, 3)), rows).now) == 2 * 3  # one more seed, two tasks, three methods


# ---- files and reports -------------------------------------------------------------------------------------------------
def test_rows_survive_the_file(tmp_path):
    rows = [at(None, 0.5), at(3e-5, 0.25, seed=1), at(1e-4, math.inf)]
    for each in rows:
        append_row(tmp_path / "runs.csv", each)
    again = read_rows(tmp_path / "runs.csv")
    assert again[:2] == rows[:2]
    assert again[2].diverged
    assert again[2].test_loss == math.inf
    assert math.isnan(again[2].test_acc)
    assert not (tmp_path / "runs.tmp").exists()
    assert read_rows(tmp_path / "none.csv") == []


def test_a_second_attempt_replaces_the_curve_of_the_first(tmp_path):
    path = tmp_path / "curves.csv"
    for rate, loss in ((3e-5, 1.0), (1e-4, 2.0), (3e-5, 3.0)):
        save_curve(path, at(rate, 0.5), [{"forwards": 10, "split": "dev", "loss": loss}])
    assert [line.rpartition(",")[2] for line in path.read_text().splitlines()] == ["loss", "2", "3"]


def example() -> list[Row]:
    rows = [at(rate, dev, test=test) for rate, dev, test in ((1e-5, 0.6, 0.61), (3e-5, 0.5, 0.55), (1e-4, math.inf, math.inf))]
    rows += [at(3e-5, 0.5, seed=1, test=0.57), at(None, 0.4, method="adanaged", test=0.5)]
    rows += [at(1e-3, 0.6, method="b", test=0.6), at(3e-3, 0.59, method="b", test=0.59)]
    return [*rows, at(3e-4, 0.3, method="first_order"), row(Run("zero-shot", "sst2", "zero_shot", None, 0, 0), 0.7)]


def test_the_table():
    text = table(example(), "python scripts/compare.py --model MODEL")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines if "---" not in line] == [
        *("| method", "| adanaged", "| a", "| b"),
        *("| method", "| first_order", "| zero_shot"),
    ]
    cells = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in lines}
    assert cells["adanaged"][1:6] == ["-", "-", "0", "2,000", "0.5000"]
    assert cells["a"][1:6] == ["3e-5", "1e-5, 3e-5, 1e-4", "0 1", "2,000", "0.5600 ± 0.0141"]
    assert cells["a"][-1] == "1e-5: 0.6100, 1e-4: diverged"
    assert cells["b"][1] == "3e-3 ↑"
    assert "    python scripts/compare.py --model MODEL\n" in text
    assert "## sst2, 2,000 forwards" in text


def test_entries_are_sorted_by_the_test_loss_at_the_rate_chosen_on_dev():
    rows = [at(1e-5, 0.5, test=0.9), at(3e-5, 0.6, test=0.1), at(1e-3, 0.6, method="b", test=0.8)]
    assert [entry.method for entry in entries(rows, "sst2", 2000)] == ["b", "a"]


def test_plots_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        draw(example(), tmp_path / "curves.csv", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plots(tmp_path):
    for each in example():
        points = [{"forwards": at, "split": split, "loss": 0.7 - at / 9000} for at in (100, 900) for split in ("train", "dev")]
        save_curve(tmp_path / "curves.csv", each, points)
    made = draw(example(), tmp_path / "curves.csv", tmp_path)
    assert [path.name for path in made] == [f"{name}-sst2-2000.png" for name in ("loss", "accuracy", "sensitivity")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_the_forecast_goes_by_the_rows_of_the_method_or_the_task():
    timing = Timing([at(3e-5, 0.5), replace(at(1e-3, 0.5, method="b"), seconds=8.0)])
    runs = [Run("two", "sst2", name, None, 0, 4000) for name in ("a", "b", "best peer 1")]
    assert [timing.seconds(run) for run in runs] == pytest.approx([4.0, 16.0, 10.0])
    assert timing.lacks([*runs, Run("two", "rte", "a", None, 0, 4000)]) == ["rte"]
    text = compare.forecast(Plan(runs, runs), timing, 2, datetime(2000, 1, 1))
    assert text.startswith("6 runs with 24,000 forwards, 2 at a time: about 0 min, until 2000-01-01 00:00")


# ---- the command line --------------------------------------------------------------------------------------------------
def test_the_command_in_the_table_names_no_folders_of_ours():
    words = ["--model", "/a/b", "--data=/c d", "--tasks", "sst2", "--out", "docs/x"]
    assert compare.command(words) == "python scripts/compare.py --model MODEL --data=DATA --tasks sst2 --out docs/x"


@pytest.fixture(scope="session")
def methods(tmp_path_factory) -> Path:
    """The shipped configurations of two methods, or stand-ins where there are none."""
    folder = tmp_path_factory.mktemp("methods")
    plain = "{class_path: zo_lightning.optim.ZerothOrder, init_args: {update: sgd, directions: gaussian}}"
    stand_ins = {
        "adanaged": "trainer: {callbacks: [{class_path: AdaNAGED}]}",
        "zo_sgd": f"model: {{init_args: {{optimizer: {plain}}}}}\ntrainer: {{callbacks: []}}",
    }
    for name, text in stand_ins.items():
        shipped = compare.METHODS / f"{name}.yaml"
        (folder / f"{name}.yaml").write_text(shipped.read_text() if shipped.exists() else text)
    return folder


@pytest.fixture
def words(tiny_opt, films, methods, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(compare, "METHODS", methods)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "sst2").symlink_to(films)
    return [
        *("--model", str(tiny_opt), "--data", str(data), "--tasks", "sst2", "--out", str(tmp_path / "out")),
        *("--methods", "adanaged", "zo_sgd", "--stage", "one", "--budget", "100", "--extend", "none", "--jobs", "2"),
    ]


TINY = ["--", "--data.num_train", "32", "--data.num_dev", "16", "--data.batch_size", "4"]


def test_a_comparison_and_nothing_left_of_it(words, tmp_path, capsys, monkeypatch):
    words += ["--rates", "zo_sgd=1e-3"]
    assert compare.main([*words, *TINY]) == 0
    out = tmp_path / "out"
    rows = {(row.method, row.rate): row for row in read_rows(out / "runs.csv")}
    assert set(rows) == {("zero_shot", None), ("adanaged", None), ("zo_sgd", 1e-3)}
    assert not any(row.diverged for row in rows.values())
    assert rows["zo_sgd", 1e-3].steps == 50
    assert rows["zo_sgd", 1e-3].forwards >= 100
    assert rows["adanaged", None].steps == steps_within(100, 2.1, 60)
    zero = rows["zero_shot", None]
    assert (zero.steps, zero.forwards, zero.last_test_loss) == (0, 0, zero.test_loss)
    curves = (out / "curves.csv").read_text()
    assert f"sst2,adanaged,,0,100,0,dev,{zero.dev_loss:.7g}\n" in curves
    assert "| zo_sgd | 1e-3 |" in (out / "table.md").read_text()
    if importlib.util.find_spec("matplotlib") is not None:
        assert len(list(out.glob("*-sst2-100.png"))) == 3
    assert "until" in capsys.readouterr().out.splitlines()[1]

    monkeypatch.setattr(Pool, "start", lambda *_: pytest.fail("nothing is left to run"))
    before = (out / "runs.csv").read_text()
    assert compare.main([*words, *TINY]) == 0
    assert (out / "runs.csv").read_text() == before
    assert "nothing is left to run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([*words, "--precision", "bf16-true"])
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*the update is skipped")
@pytest.mark.parametrize(("method", "rate", "budget", "steps"), [("zo_sgd", 1e12, 40, 10), ("first_order", 1e-3, 11, 3)])
def test_one_run(method, rate, budget, steps, words, tmp_path):
    """One that diverges: ten losses in a row are not finite. And one by gradients: three forwards for each of its steps."""
    if not (compare.CONFIGS / "methods" / f"{method}.yaml").exists():
        pytest.skip(f"no configuration of {method}")
    given = dict(zip(words[::2], words[1::2], strict=False))
    order = {
        **{"run": vars(Run("one", "sst2", method, rate, 0, budget)), "threads": 1, "began": time.time(), "name": "tiny"},
        **{"model": given["--model"], "data": given["--data"], "accelerator": "cpu", "precision": "32-true"},
        **{"config": str(compare.CONFIGS / "opt-125m" / "sst2.yaml"), "methods": str(compare.CONFIGS / "methods")},
        "options": TINY[1:],
    }
    found = Row(**measure(order, tmp_path / "run")["row"])
    assert (found.steps, found.diverged) == (steps, method == "zo_sgd")
    if found.diverged:
        assert found.test_loss == found.dev_loss == found.last_test_loss == math.inf
    else:
        assert found.forwards == 9


def test_an_error_is_reported_at_the_end_and_tried_again(words, tmp_path, capsys, monkeypatch):
    """In place of the processes: one that fails, and one that ends without a word."""

    def start(pool: Pool, run: Run) -> None:
        pool.running[run] = None

    def finished(pool: Pool) -> list:
        found = []
        for run in list(pool.running):
            del pool.running[run]
            result = {"row": vars(row(run, 0.5)), "curve": [], "training_seconds": 1.0}
            found.append((run, {"error": "TypeError: no", "log": "    a line"} if run.method == "zo_sgd" else result))
        return found

    monkeypatch.setattr(Pool, "start", start)
    monkeypatch.setattr(Pool, "finished", finished)
    assert compare.main(words) == 1
    assert "error: sst2 zo_sgd at 1e-05, seed 0, 100 forwards: TypeError: no\n    a line" in capsys.readouterr().err
    rows = read_rows(tmp_path / "out" / "runs.csv")
    assert {row.method for row in rows} == {"zero_shot", "adanaged"}
    left = plan(Settings(["adanaged", "zo_sgd"], ["sst2"], budgets=(100, 100), stages=("one",)), rows)
    assert {run.method for run in left.now} == {"zo_sgd"}


def test_a_process_that_dies_is_an_error_of_its_run(tmp_path):
    pool = Pool(1, {"methods": "nowhere"}, tmp_path)
    run = Run("one", "sst2", "a", None, 0, 10)
    pool.start(run)
    assert pool.free == 0
    pool.running[run][0].kill()
    ((ended, result),) = pool.finished()
    assert ended == run
    assert "no result" in result["error"]
    assert not list(tmp_path.iterdir())
    pool.start(run)
    pool.close()
    assert pool.free == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--methods", "no_such"], "there is no no_such.yaml"),
        (["--rates", "zo_sgd:1"], "expected METHOD=RATE,RATE"),
        (["--tasks", "rte"], "there is no folder"),
        (["--stage", "two"], "takes its peers from stage one"),
        (["--budget", "0"], "positive"),
        (["--neighbours", "-1"], "positive"),
    ],
)
def test_mistakes_are_refused_early(changed, message, words, capsys):
    with pytest.raises(SystemExit):
        compare.main([*words, *changed])
    assert message in capsys.readouterr().err


def test_the_dry_run_writes_nothing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Timing, "measure", lambda *_: "not now")
    assert compare.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "stage one: sst2 zo_sgd at 3e-05, seed 0, 100 forwards" in printed
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["data"]'
