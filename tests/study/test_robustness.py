"""Killed, interrupted, started twice: a study loses no finished run, repeats none, and ends with the same records."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from batchnorm import OutputError, RecordsError
from batchnorm.study import events, records, run_study, runs
from batchnorm.study.config import SECTION_NAMES
from batchnorm.study.folder import RunFolder
from batchnorm.study.records import read
from study import made_images
from study.tiny import TINY

SOURCE, TESTS = Path(runs.__file__).parents[2], Path(__file__).parents[1]
SHORT = TINY.with_options(sections=("deep",))

SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    sys.path[:0] = [{source!r}, {tests!r}]
    from batchnorm.study import run_study
    from batchnorm.study.config import StudyConfig
    from batchnorm.study.pool import Workers

    def slow(run, report):
        time.sleep(60)

    def tell(event):
        print(type(event).__name__, getattr(event, "run", ""), flush=True)

    if __name__ == "__main__":
        if sys.argv[1] == "pool":
            from batchnorm.study.plan import Run
            pool = Workers(1, slow)
            pool.submit(Run("deep/x", "deep", "x", 0, 1, 1.0))
            print(next(iter(pool._processes.values())).pid, flush=True)
            pool.wait(print)
        run_study(StudyConfig.load(sys.argv[2]), sys.argv[1], resume=True, workers=2, on_event=tell)
"""


@pytest.fixture
def script(tmp_path):
    """A study in a process of its own: ``script(folder, config)`` starts it, in a process group of its own."""
    path = tmp_path / "a_study.py"
    path.write_text(textwrap.dedent(SCRIPT.format(source=str(SOURCE), tests=str(TESTS))))
    started = []

    def start(folder, config):
        (tmp_path / "asked.toml").write_text(config.to_toml())
        command = [sys.executable, str(path), str(folder), str(tmp_path / "asked.toml")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def timeless(folder):
    """The records in the file's order, without what may differ: wall times."""
    return [line for line in read(folder / "records.jsonl") if line["metric"] != "seconds"]


def follow(process, finished):
    """Read what the study tells until so many runs are finished; the ids of those that began and that ended."""
    begun, ended = [], []
    while len(ended) < finished and (line := process.stdout.readline()):
        kind, _, run = line.strip().partition(" ")
        if kind in ("RunStarted", "RunFinished"):
            (begun if kind == "RunStarted" else ended).append(run)
    return begun, ended


def workers_of(process):
    """The worker processes of a study."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("this system does not tell a process's children")
    found = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pid):
    """Whether the process ends within half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A tiny study of every section there is, those on files included, and the folder of its uninterrupted run."""
    data = tmp_path_factory.mktemp("data")
    made_images.cifar10(made_images.mnist(data))
    config = TINY.with_options(sections=SECTION_NAMES, data_dir=str(data))
    folder = tmp_path_factory.mktemp("every") / "run"
    run_study(config, folder, workers=1)
    return config, folder


def test_killed_again_and_again_it_ends_with_the_same_records(every, script, tmp_path):
    """SIGKILL at random moments, a torn line at the end of the last: every section, no run twice."""
    config, whole = every
    folder, rng = tmp_path / "run", random.Random(7)
    done = set()
    for after in (2, 30):
        process = script(folder, config)
        begun, ended = follow(process, after + 1)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        assert len(ended) == after + 1
        assert not set(begun) & done
        kept = read(folder / "records.jsonl").finished()
        assert kept >= set(ended) | done
        done |= kept - {"environment"}
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"section": "headline", "variant": "no')
    seen = []
    summary = run_study(None, folder, resume=True, workers=1, on_event=seen.append)
    assert next(event.dropped for event in seen if isinstance(event, events.StudyResumed))
    last = {event.run for event in seen if isinstance(event, events.RunStarted)}
    assert last
    assert not last & done
    assert summary.complete
    assert [section.name for section in summary.sections] == list(config.sections)
    assert timeless(folder) == timeless(whole)
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "records.jsonl", "summary.json"]


def test_a_killed_worker_is_named_and_the_study_goes_on_later(script, tmp_path):
    run_study(SHORT, tmp_path / "whole", workers=1)
    process = script(tmp_path / "run", SHORT)
    follow(process, 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    # A worker between two runs is missed when the next is handed to it.
    assert "RunFailedError: run deep/" in last
    assert "its process died (exit code -9); finished runs are kept, resume after mending the cause" in last
    run_study(None, tmp_path / "run", resume=True, workers=1)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupt_of_the_whole_group(script, tmp_path, finished):
    """What Ctrl-C does, while the workers are still starting (0) and under load: one traceback, the parent's."""
    process = script(tmp_path / "run", SHORT)
    assert process.stdout.readline().startswith("StudyStarted")
    follow(process, finished)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1
    run_study(None, tmp_path / "run", resume=True, workers=1)
    run_study(SHORT, tmp_path / "whole", workers=1)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_a_worker_ends_with_its_parent_however_long_its_run_is(script):
    process = script("pool", SHORT)
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    process.communicate()
    assert gone(worker)


def test_two_studies_in_one_folder(script, tmp_path):
    """The second is refused while the first runs, and not when it was killed: the lock goes with its process."""
    folder = tmp_path / "run"
    process = script(folder, SHORT)
    follow(process, 1)
    for resume in (False, True):
        message = (
            rf"^a study is running in .*run \(process {process.pid}\): wait for its end, or choose another folder$"
        )
        with pytest.raises(RecordsError, match=message):
            run_study(SHORT, folder, resume=resume, workers=1)
    process.kill()
    process.communicate()
    assert (folder / ".lock").exists()
    assert run_study(SHORT, folder, resume=True, workers=1).complete
    assert not (folder / ".lock").exists()


def test_the_lock_is_let_go(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
        with pytest.raises(RecordsError, match="a study is running in"), folder.locked():
            pytest.fail("two at once")
    assert not (tmp_path / "run").exists()  # it was made for the block, and holds nothing
    with pytest.raises(KeyboardInterrupt), folder.locked():
        raise KeyboardInterrupt
    with folder.locked():
        pass


def test_what_a_kill_left_half_written_is_no_obstacle(tmp_path):
    """Killed before the configuration was in its place: nothing was started, and nothing is in the way."""
    (tmp_path / ".lock").write_text("1")
    (tmp_path / ".config.toml.4321.part").write_text("preset = ")
    (tmp_path / ".records.jsonl.4321.part").write_text("{")
    assert run_study(SHORT, tmp_path, resume=True, workers=1).complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "records.jsonl", "summary.json"]


def test_killed_between_the_configuration_and_the_first_record(tmp_path):
    run_study(SHORT, tmp_path / "whole", workers=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(SHORT.to_toml())
    for rest in (None, "", '{"section": "environment", "vari'):
        if rest is not None:
            (tmp_path / "run" / "records.jsonl").write_text(rest)
        run_study(None, tmp_path / "run", resume=True, workers=1)
        assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_an_interrupted_append_leaves_no_torn_line(tmp_path, monkeypatch):
    """Else the next line would be put after half of this one, and the file could not be read again."""
    path = tmp_path / "records.jsonl"
    block = [events_line("a", 0), events_line("a", 1)]
    records.append(path, block)
    before = path.read_bytes()
    for error, caught in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), OutputError)):

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(caught):
            records.append(path, [events_line("b", 0)])
        assert path.read_bytes() == before


def events_line(run, step):
    return {"section": "s", "variant": "v", "seed": 0, "step": step, "metric": "m", "value": 1, "run": run}
