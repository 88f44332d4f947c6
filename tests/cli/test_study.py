from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.commandline import TINY, Finished, Outcome, shell

Call = Callable[..., Outcome]


def test_a_study_ends_with_its_summary_and_its_page(finished: Finished) -> None:
    outcome, folder = finished.outcome, finished.folder
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    names = {item.name for item in folder.iterdir()}
    assert names == {"config.toml", "records.jsonl", "summary.json", "report.html"}
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"study in {folder}: ")
    assert any(re.match(r"100%  all \d+ runs finished in ", line) for line in lines)
    assert "What this does not say:" in outcome.out
    assert "Question" in outcome.out
    assert lines[-1] == f"The page: {folder / 'report.html'}"
    assert all(character == "\n" or character >= " " for character in outcome.out)


def test_the_page_names_a_command_that_repeats_the_study(finished: Finished, tiny_config: Path) -> None:
    page = (finished.folder / "report.html").read_text()
    assert f"batchnorm study --config {tiny_config}<" in page
    assert page.count('class="chart') == sum(
        len(section["figures"]) for section in json.loads((finished.folder / "summary.json").read_text())["sections"]
    )


def test_the_page_is_rebuilt_from_the_records_without_torch(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    # None in sys.modules makes every import of torch an ImportError.
    outcome = shell(
        "report", str(finished.folder), "--out", str(out), prelude="import sys; sys.modules['torch'] = None"
    )
    assert outcome == Outcome(0, f"{out}\n", "")
    assert out.read_text() == (finished.folder / "report.html").read_text()


def test_a_run_without_its_summary_is_rebuilt_too(finished: Finished, tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "records.jsonl"):
        (folder / name).write_bytes((finished.folder / name).read_bytes())
    outcome = call("report", str(folder))
    assert outcome == Outcome(0, f"{folder / 'report.html'}\n", "")
    assert f"batchnorm study --config {folder / 'config.toml'}<" in (folder / "report.html").read_text()


def test_json_leaves_one_document_on_stdout(finished: Finished) -> None:
    # Finished already, so going on takes no time and does not repeat anything.
    outcome = shell("study", "--resume", "--json", "--out", str(finished.folder))
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["run"] == str(finished.folder)
    assert document["page"] == str(finished.folder / "report.html")
    assert document["complete"] is True
    assert document["speedup_90"]["seeds"] == [0]
    assert [section["name"] for section in document["sections"]] == ["headline"]
    assert re.search(r"going on: \d+ runs were finished before", outcome.err)


def test_a_folder_in_use_is_refused(finished: Finished, call: Call) -> None:
    outcome = call("study", "--out", str(finished.folder))
    assert outcome.code == 1
    assert outcome.err.startswith(f"batchnorm: {finished.folder} already holds a study: ")
    assert outcome.out == ""


def test_a_study_is_not_resumed_as_another(finished: Finished, call: Call) -> None:
    outcome = call("study", "--resume", "--seeds", "7", "--out", str(finished.folder))
    assert outcome.code == 1
    assert "cannot resume" in outcome.err
    assert "1 saved" in outcome.err


def test_options_reach_the_study(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    def run_study(config: object, out: Path, **options: object) -> None:
        seen.update(options, config=config, out=out)
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.study.run_study", run_study)
    monkeypatch.chdir(tmp_path)
    outcome = call("study", "--quick", "--seeds", "4", "--seed", "9", "--sections", "deep, headline", "--workers", "3")
    config = seen["config"]
    assert (config.preset, config.seeds, config.headline.seeds, config.seed) == ("quick", 4, 4, 9)  # type: ignore[attr-defined]
    assert config.sections == ("headline", "deep")  # type: ignore[attr-defined]
    assert (seen["workers"], seen["resume"]) == (3, False)
    assert seen["command"] == "batchnorm study --quick --seeds 4 --seed 9 --sections deep,headline"
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", str(seen["out"]))
    assert outcome.code == 130

    call("study", "--resume", "--out", "there")
    assert seen["config"] is None
    assert (seen["out"], seen["resume"]) == (Path("there"), True)
    assert seen["command"] == "batchnorm study --config there/config.toml"


def test_what_the_page_needs_is_asked_for_before_the_study(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "plotly" else object())
    outcome = call("study", "--out", str(tmp_path / "run"))
    assert outcome.code == 1
    assert "plotly, which is not installed: pip install 'batchnorm[report]'" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tmp_path / "config.toml"
    config.write_text(TINY.replace("tune_steps = 20", "tune_steps = 20000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm", "study", "--config", str(config), "--out", str(folder), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: whoever starts us in the background ignores SIGINT, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("study in ")
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert re.fullmatch(
        r"batchnorm: interrupted, \d+ finished runs? kept in \S+; "
        r"go on with: batchnorm study --resume --out \S+\n",
        error,
    )
    assert (folder / "config.toml").exists()
    assert not (folder / "report.html").exists()
