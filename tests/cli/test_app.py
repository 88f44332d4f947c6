from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import batchnorm
from cli.commandline import Outcome, shell

Call = Callable[..., Outcome]
COMMANDS = [
    *("fit", "transform", "merge", "inspect", "doctor", "recalibrate", "fold"),
    *("study", "report", "selftest", "completion"),
]


def test_the_version(call: Call) -> None:
    assert call("--version").out == f"batchnorm {batchnorm.__version__}\n"
    assert shell("--version").out == f"batchnorm {batchnorm.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["completion", "zsh"],
        *(
            [command, "--help"]
            for command in ("study", "fit", "transform", "merge", "inspect", "doctor", "recalibrate", "fold")
        ),
    ],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from batchnorm.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'plotly', 'jinja2', 'sklearn', 'rich', 'pyarrow', 'ray'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "HEAVY []\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(call: Call, command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: batchnorm {command} ")
    assert "Examples:" in outcome.out
    assert f"batchnorm {command}" in outcome.out.split("Examples:")[1]


def test_without_a_command_there_is_help(call: Call) -> None:
    outcome = call()
    assert outcome.code == 0
    assert all(name in outcome.out for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "batchnorm: No such command 'frobnicate'. (see batchnorm --help)\n"),
        (["report"], "batchnorm: Missing argument 'RUN'. (see batchnorm report --help)\n"),
        (["study", "--resume"], "--resume needs --out DIR, the folder of the study to go on with (see batchnorm study"),
        (["study", "--quick", "--config", "x.toml"], "--quick, --full and --config exclude each other (see "),
        (["study", "--seeds", "0"], "0 is not in the range x>=1"),
        (["study", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["study", "--workers", "none"], "'none' is not a valid integer"),
        (["study", "--sections", "headline,depe"], "unknown section 'depe', expected some of headline, deep, "),
        (["study", "--sections", " , "], "unknown section '', expected some of headline, "),
        (["completion", "csh"], "'csh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(call: Call, arguments: list[str], message: str) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("batchnorm: ")
    assert message in outcome.err


def test_an_error_is_one_line_and_exit_code_1(call: Call, tmp_path: Path) -> None:
    outcome = call("report", str(tmp_path / "no such run"))
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert "no such run" in outcome.err
    outcome = call("study", "--config", str(tmp_path / "missing.toml"), "--out", str(tmp_path / "run"))
    assert outcome.code == 1
    assert outcome.err.startswith(f"batchnorm: cannot read the configuration {tmp_path}/missing.toml")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_many_lines_is_told_in_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise batchnorm.RecordsError("first\n  second")

    monkeypatch.setattr("batchnorm.report.rebuild", fail)
    assert call("report", "x") == Outcome(1, "", "batchnorm: first second\n")


def test_ctrl_c_outside_of_a_study(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.report.rebuild", interrupt)
    assert call("report", "x").code == 130


def test_whoever_stops_reading_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "batchnorm", "study", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(60)


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_scripts(call: Call, shell_name: str) -> None:
    outcome = call("completion", shell_name)
    assert outcome.code == 0
    assert "_BATCHNORM_COMPLETE" in outcome.out


def test_sections_are_completed_one_after_the_other() -> None:
    outcome = shell(
        _BATCHNORM_COMPLETE="bash_complete", COMP_WORDS="batchnorm study --sections headline,d", COMP_CWORD="3"
    )
    assert outcome.out.split() == [f"plain,headline,{name}" for name in ("deep", "distribution", "domains")]


def test_the_help_of_a_study_names_the_sections() -> None:
    from batchnorm.study.config import SECTION_NAMES

    outcome = shell("study", "--help")
    told = " ".join(outcome.out.split())
    assert all(name in told for name in SECTION_NAMES)
    assert "mnist and cifar10 need --data-dir" in told


def test_a_download_needs_a_folder() -> None:
    outcome = shell("study", "--sections", "mnist", "--download")
    assert outcome.code == 2
    assert "--download needs --data-dir DIR, the folder to fetch into" in outcome.err
