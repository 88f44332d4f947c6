"""The doctor's frame, with rules made for the test."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes.health import DoctorConfig, Sign, find_config, read_config, rule, rules, selected
from batchnorm.probes.health.rule import matches


@pytest.fixture
def made(monkeypatch):
    """A register of four rules in place of the real one."""
    monkeypatch.setattr(sys.modules["batchnorm.probes.health.rule"], "_RULES", {})

    @rule("BN901", "each-layer", "info")
    def each(subject):
        """Finds each layer.

        False alarms: all of them.
        """
        for layer in subject.layers:
            yield Sign(layer.name, "is here", "bn.fold(model, example)", {"gap": float("nan"), "at": (1, float("inf"))})

    @rule("BN902", "worse-when-affine", "warning")
    def affine(subject):
        """Finds affine layers."""
        for layer in subject.layers:
            if layer.module.weight is not None:
                yield Sign(layer.name, "is affine", "nothing", severity="error")

    @rule("BN911", "needs-data", "warning", needs="batches")
    def data(subject):
        """Finds data."""
        yield Sign("", f"{sum(len(batch) for batch in subject.batches)} samples", "nothing")

    @rule("BN912", "needs-optimizer", "warning", needs="optimizer")
    def optimizer(subject):
        """Finds an optimizer."""
        yield Sign("", str(len(subject.groups)), "nothing")


@pytest.mark.usefixtures("made")
def test_findings_are_sorted_and_told_as_plain_types():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3))
    found = bn.diagnose(model)
    assert [(f.code, f.severity, f.layer) for f in found] == [
        ("BN902", "error", "1"),
        ("BN901", "info", "0"),
        ("BN901", "info", "1"),
    ]
    assert (len(found), bool(found), found.worst, found.layers) == (3, True, "error", 2)
    assert found.codes == {"BN901", "BN902"}
    assert found.counts() == {"error": 1, "warning": 0, "info": 2}
    assert found.skipped == {"BN911": "needs batches", "BN912": "needs optimizer"}
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["findings"][1]["numbers"] == {"gap": "nan", "at": [1, "inf"]}
    assert str(found).splitlines()[0] == "BN902 error 1: is affine"
    assert str(found).splitlines()[-1] == "2 batch norms looked at: 1 error, 2 info"
    assert str(bn.diagnose(nn.ReLU())) == "0 batch norms looked at, 2 rules, nothing found"


@pytest.mark.usefixtures("made")
def test_batches_may_be_a_generator():
    model = nn.BatchNorm1d(3)
    for batches in ([torch.ones(2, 3), torch.ones(5, 3)], iter([torch.ones(2, 3), torch.ones(5, 3)])):
        assert bn.diagnose(model, batches).of("BN911")[0].message == "7 samples"
    with pytest.raises(bn.InputError, match="expected at least one batch to look at, got none"):
        bn.diagnose(model, iter([]))


@pytest.mark.usefixtures("made")
def test_rules_are_selected_by_codes_names_and_patterns():
    def codes(*arguments):
        return [found.code for found in selected(*arguments)]

    assert codes() == ["BN901", "BN902", "BN911", "BN912"]
    assert codes(["BN91"]) == codes(["needs-*"]) == codes(["bn91"]) == ["BN911", "BN912"]
    assert codes(["BN"], ["each-layer", "BN911"]) == ["BN902", "BN912"]
    assert codes(["BN90*"], ["BN902"]) == ["BN901"]
    for wanted in ("BN8", "each", "9"):
        with pytest.raises(bn.InputError, match=f"expected a rule's code or name, got '{wanted}'"):
            selected([wanted])
    assert rules()[0].summary == "Finds each layer."
    assert rules()[0].explanation.endswith("False alarms: all of them.")


def test_what_is_no_module_is_refused():
    with pytest.raises(bn.InputError, match=r"expected a torch.nn.Module, got dict"):
        bn.diagnose({"weight": torch.ones(1)})


@pytest.mark.usefixtures("made")
def test_a_code_is_given_once():
    with pytest.raises(AssertionError, match="BN901 is taken"):
        rule("BN901", "again", "info")(iter)


@pytest.mark.usefixtures("made")
def test_a_project_s_wishes(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[tool.batchnorm.doctor]\nselect = ["BN90"]\nignore = ["worse-when-affine"]\nfail-on = "info"\n'
        '[tool.batchnorm.doctor.layers]\n"0*" = ["BN901"]\n'
    )
    (tmp_path / "deep").mkdir()
    assert find_config(tmp_path / "deep") == path
    wanted = read_config(path)
    assert wanted == DoctorConfig(("BN90",), ("worse-when-affine",), {"0*": ("BN901",)}, "info")
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    found = wanted.without_ignored(bn.diagnose(model, select=wanted.select, ignore=wanted.ignore))
    assert [(f.code, f.layer) for f in found] == [("BN901", "1")]
    assert wanted.fails(found)
    assert not DoctorConfig().fails(found)
    assert not DoctorConfig(fail_on=None).fails(bn.diagnose(model))
    assert DoctorConfig(fail_on="warning").fails(bn.diagnose(model))  # an error is worse
    path.write_text("[tool.other]\nx = 1\n")
    assert read_config(path) == DoctorConfig()


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selct = []", "expected select, ignore, layers, fail-on in .*, got 'selct'"),
        ('select = "BN901"', "expected select to be a list of codes, got 'BN901'"),
        ('ignore = ["BN777"]', "ignore: expected a rule's code or name, got 'BN777'"),
        ('fail-on = "always"', "expected fail-on to be error, warning, info or never, got 'always'"),
        ("layers = 3", "expected layers to be a table of patterns and codes, got 3"),
        ("x = = 3", "cannot read"),
    ],
)
def test_bad_configuration_is_refused(text, message, tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[tool.batchnorm.doctor]\n{text}\n")
    with pytest.raises(bn.ConfigError, match=message):
        read_config(path)


@pytest.mark.usefixtures("made")
def test_findings_match_by_code_and_name():
    (finding, _) = bn.diagnose(nn.BatchNorm1d(2))
    assert [matches(finding, wanted) for wanted in ("BN902", "BN9", "worse-*", "BN901")] == [True, True, True, False]


def test_what_a_script_hides_is_said():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), torch.jit.script(nn.ReLU()))
    found = bn.diagnose(model, [torch.randn(32, 3) for _ in range(3)])
    assert found.skipped["BN001"] == "needs a model in Python, without a ScriptModule in it"
    assert "BN301" in found.checked
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.script(model)
    with pytest.raises(bn.InputError, match="a ScriptModule: diagnose the model that it was made from"):
        bn.diagnose(script)


@pytest.mark.parametrize("batches", [torch.randn(8, 3), {"x": torch.randn(8, 3)}, "loader", 5, nn.ReLU()])
def test_one_batch_in_the_place_of_several_is_refused(batches):
    with pytest.raises(bn.InputError, match=f"expected batches to iterate over, got .*{type(batches).__name__}"):
        bn.diagnose(nn.Sequential(nn.BatchNorm1d(3)), batches)


def test_something_that_is_no_optimizer_is_refused():
    with pytest.raises(bn.InputError, match=r"expected optimizer= to be a torch.optim.Optimizer, got float"):
        bn.diagnose(nn.BatchNorm1d(3), optimizer=0.1)


def test_a_lone_code_is_no_list_of_letters():
    assert set(bn.diagnose(nn.BatchNorm1d(3), select="BN20").checked) == {f"BN20{i}" for i in range(1, 7)}
    assert "BN201" not in bn.diagnose(nn.BatchNorm1d(3), ignore="never-updated").checked
