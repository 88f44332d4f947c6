"""``batchnorm doctor``, ``recalibrate`` and ``fold`` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.commandline import Outcome, shell

Call = Callable[..., Outcome]

pytestmark = pytest.mark.usefixtures("project")

NAME = "nets"
NET = '''
import torch
from torch import nn


def build(classes=2, dead=False):
    """A small net."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
    )
    if dead:
        model[1].running_var[2] = float("nan")
    return model.eval()


def build_with_optimizer():
    model = build()
    return model.train(), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)


def loader():
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        yield 3 + 2 * torch.randn(16, 3, 6, 6, generator=generator), torch.zeros(16)


def one():
    return torch.randn(16, 3, 6, 6)


def frozen():
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(3)])
    return model.requires_grad_(False)


def broken():
    raise RuntimeError("no such weights\\nhere")


def text():
    return "a model"


thing = build()
'''


def test_a_sick_model_fails_with_three(call: Call) -> None:
    done = call("doctor", "nets:build", "--kwargs", '{"dead": true}')
    assert done.code == 3, done.err
    assert "BN204" in done.out
    assert "nets:build: 1 batch norm, " in done.out


def test_severities_decide_the_exit_code(call: Call) -> None:
    assert call("doctor", "nets:build", "--kwargs", '{"dead": true}', "--fail-on", "never").code == 0
    assert (
        call("doctor", "nets:build", "--kwargs", '{"dead": true}', "--select", "BN204", "--fail-on", "error").code == 3
    )
    assert call("doctor", "nets:build", "--kwargs", '{"dead": true}', "--ignore", "BN").code == 0
    assert call("doctor", "nets:build", "--select", "BN204", "--fail-on", "info").code == 0


def test_json_is_one_document(call: Call) -> None:
    done = call("doctor", "nets.py:build", "--kwargs", '{"dead": true}', "--json", "--select", "BN204")
    document = json.loads(done.out)
    assert document["model"] == "nets.py:build"
    (finding,) = document["findings"]
    assert (finding["code"], finding["layer"], finding["severity"]) == ("BN204", "1", "error")
    assert document["counts"] == {"error": 1, "warning": 0, "info": 0}


def test_sarif_and_github_name_the_factory_s_place(call: Call) -> None:
    arguments = ("doctor", "nets:build", "--kwargs", '{"dead": true}', "--select", "BN204", "--format")
    log = json.loads(call(*arguments, "sarif").out)
    (result,) = log["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    line = NET.splitlines().index("def build(classes=2, dead=False):") + 1
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("nets.py", line)
    assert call(*arguments, "github").out.startswith(f"::error file=nets.py,line={line},title=BN204 ")
    assert call("doctor", "nets:build", "--select", "BN204", "--format", "github").out == ""


def test_data_of_a_function_and_of_a_file(call: Call) -> None:
    done = json.loads(call("doctor", "nets:build", "--data", "nets:loader", "--json").out)
    assert {"BN301", "BN201"} & {finding["code"] for finding in done["findings"]}
    assert "BN301" not in done["skipped"]
    np.save("x.npy", np.random.default_rng(0).normal(3, 2, (96, 3, 6, 6)).astype("float32"))
    done = json.loads(call("doctor", "nets:build", "--data", "x.npy", "--batch-size", "16", "--json").out)
    assert "BN301" not in done["skipped"]
    alone = json.loads(call("doctor", "nets:build", "--json").out)
    assert alone["skipped"]["BN301"] == "needs batches"


def test_an_optimizer_comes_from_the_factory(call: Call) -> None:
    done = json.loads(call("doctor", "nets:build_with_optimizer", "--json").out)
    assert "BN107" in {finding["code"] for finding in done["findings"]}


def test_a_checkpoint_is_what_is_examined(call: Call) -> None:
    import nets  # type: ignore[import-not-found]

    torch.save({"state_dict": nets.build(dead=True).state_dict()}, "sick.pt")
    done = call("doctor", "nets:build", "--checkpoint", "sick.pt", "--select", "BN204")
    assert done.code == 3
    assert call("doctor", "nets:build", "--checkpoint", "absent.pt").err.startswith(
        "batchnorm: cannot read 'absent.pt'"
    )


def test_the_project_s_configuration_is_read(call: Call, project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.batchnorm.doctor]\nlayers = {"1" = ["BN204"]}\nselect = ["BN2"]\n')
    assert call("doctor", "nets:build", "--kwargs", '{"dead": true}', "--select", "BN204").code == 0
    assert call("doctor", "nets:build", "--kwargs", '{"dead": true}', "--select", "BN204", "--no-config").code == 3
    (project / "other.toml").write_text('[tool.batchnorm.doctor]\nselect = ["nothing"]\n')
    done = call("doctor", "nets:build", "--config", "other.toml")
    assert done.err.startswith("batchnorm: other.toml: select: expected a rule's code or name, got 'nothing'")


def test_rules_are_listed_and_explained(call: Call) -> None:
    listed = json.loads(call("doctor", "--rules", "--json").out)
    assert len(listed) >= 20
    assert all(rule["summary"] for rule in listed)
    assert "BN204" in call("doctor", "--rules").out
    told = call("doctor", "--explain", "BN204").out
    assert told.startswith("BN204 ")
    assert "False alarms:" in told
    assert call("doctor", "--explain", "BN999").code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'MODULE:FACTORY'. (see batchnorm doctor --help)"),
        (["nets"], 1, "expected module:name or file.py:name, got 'nets'"),
        (["nets:biuld"], 1, "nets has no 'biuld', did you mean 'build'?"),
        (["absent:build"], 1, "cannot import absent: ModuleNotFoundError: No module named 'absent'"),
        (["absent.py:build"], 1, "cannot import absent.py: InputError: no such file: 'absent.py'"),
        (["nets:broken"], 1, "nets:broken fails: RuntimeError: no such weights here"),
        (["nets:text"], 1, "expected nets:text to give a torch.nn.Module, or one and its optimizer, got str"),
        (["nets:build", "--kwargs", "[1]"], 2, "expected a JSON object, got '[1]'"),
        (["nets:build", "--kwargs", '{"size": 1}'], 1, "nets:build fails: TypeError: build() got an unexpected"),
        (["nets:build", "--select", "BN9"], 1, "expected a rule's code or name, got 'BN9'"),
        (["nets:build", "--example-shape", "3,x"], 2, "expected sizes parted by commas, such as 1,3,224,224"),
        (["nets:build", "--data", "nets:one"], 1, "expected nets:one to give batches to iterate over, got Tensor"),
        (["nets:build", "--data", "nets:loader", "--columns", "x"], 2, "--stats and --columns are for files"),
        (["nets:build", "--key", "ema"], 2, "--key is a place in a --checkpoint"),
        (["nets:build", "--data", "absent.npy"], 1, "no such file or folder: 'absent.npy'"),
        (["nets:build", "--data", "nets:build"], 1, "to give batches to iterate over, got Sequential"),
        (["nets:build", "--data", "nets:thing.training"], 1, "to give batches to iterate over, got bool"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], code: int, message: str, call: Call) -> None:
    done = call("doctor", *arguments)
    assert done.code == code
    assert message in done.err
    assert done.err.startswith("batchnorm: ")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_model_of_the_module_itself_in_a_process_of_its_own(project: Path) -> None:
    done = shell("doctor", "nets:thing", "--select", "BN204", cwd=project)
    assert (done.code, done.err) == (0, "")
    assert "nothing found" in done.out


def test_the_columns_of_a_file_are_chosen(project: Path, call: Call) -> None:
    np.savez(project / "two.npz", x=np.random.default_rng(0).normal(size=(64, 3)), y=np.zeros(64))
    done = call("doctor", "nets:frozen", "--data", "two.npz", "--columns", "x", "--select", "BN308", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["checked"] == ["BN308"]


def test_a_remedy_that_names_its_layer_is_shown_once_for_all(call: Call) -> None:
    done = call("doctor", "nets:frozen", "--select", "BN102")
    assert done.out.count("BN102") == 1
    assert "bn.freeze(model, ['0', '1', '2'])" in done.out
