"""Files of weights: safe to read, found whatever wraps them, written back in the shape they came in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import batchnorm as bn
from batchnorm.surgery.checkpoints import Checkpoint, load_into, read_checkpoint, updated, write_checkpoint
from oracles.model_zoo import randomize_statistics


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def state():
    return randomize_statistics(net(), 1).state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("place", [None, "state_dict", "model_state_dict", "model"])
def test_a_state_is_found_under_the_usual_names(state, prefix, place, tmp_path):
    held = {prefix + key: value for key, value in state.items()}
    torch.save(held if place is None else {"epoch": 3, place: held}, tmp_path / "net.pt")
    found, model = read_checkpoint(tmp_path / "net.pt"), net()
    assert found.place == (() if place is None else (place,))
    assert load_into(model, found) == prefix
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_safetensors_with_its_metadata(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors", metadata={"who": "me"})
    found, model = read_checkpoint(tmp_path / "a.safetensors"), net()
    load_into(model, found)
    with torch.no_grad():
        model[1].running_mean += 1
    write_checkpoint(updated(found, model, ""), tmp_path / "b.safetensors")
    again = read_checkpoint(tmp_path / "b.safetensors")
    assert again.metadata == {"who": "me"}
    assert torch.equal(again.state["1.running_mean"], state["1.running_mean"] + 1)
    assert torch.equal(again.state["0.weight"], state["0.weight"])


def test_what_else_a_file_holds_stays(state, tmp_path):
    document = {"state_dict": {"module." + k: v.half() if v.is_floating_point() else v for k, v in state.items()}}
    document |= {"optimizer": {"lr": 0.1, "moments": torch.ones(2)}, "epoch": 7}
    torch.save(document, tmp_path / "net.pt")
    found, model = read_checkpoint(tmp_path / "net.pt"), net()
    prefix = load_into(model, found)
    with torch.no_grad():
        model[1].running_var.fill_(3)
    write_checkpoint(updated(found, model, prefix), tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert (new["epoch"], new["optimizer"]["lr"]) == (7, 0.1)
    assert new["state_dict"]["module.1.running_var"].tolist() == [3] * 4
    assert new["state_dict"]["module.1.running_var"].dtype == torch.float16
    # The one that was read is as it was.
    assert not torch.equal(found.state["module.1.running_var"], new["state_dict"]["module.1.running_var"])


def test_the_key_says_where(state, tmp_path):
    torch.save({"state_dict": {}, "ema": {"shadow": state}}, tmp_path / "net.pt")
    assert read_checkpoint(tmp_path / "net.pt", "ema.shadow").place == ("ema", "shadow")
    with pytest.raises(bn.CheckpointError, match=r"has no 'ema.nothing': it has 'state_dict', 'ema'"):
        read_checkpoint(tmp_path / "net.pt", "ema.nothing")
    with pytest.raises(bn.CheckpointError, match="has no state of a model at 'state_dict'"):
        read_checkpoint(tmp_path / "net.pt", "state_dict")
    with pytest.raises(bn.CheckpointError, match="that can be found: it has 'state_dict', 'ema'"):
        read_checkpoint(tmp_path / "net.pt")


class Runs:
    """Unpickling it runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_in_a_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Runs()}, "bad.pt")
    with pytest.raises(bn.CheckpointError, match=r"'bad.pt' holds more than tensors and plain types"):
        read_checkpoint("bad.pt")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_damaged_and_missing_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"nonsense" * 20)
    with pytest.raises(bn.CheckpointError, match="is damaged or no file of weights"):
        read_checkpoint(tmp_path / name)
    with pytest.raises(bn.CheckpointError, match=r"cannot read .*absent"):
        read_checkpoint(tmp_path / f"absent-{name}")


def test_a_state_of_another_model_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "net.pt")
    found = read_checkpoint(tmp_path / "net.pt")
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(bn.CheckpointError, match=r"does not belong to this model: missing 2.weight, 2.bias$"):
        load_into(other, found)
    with pytest.raises(bn.CheckpointError, match=r"0.weight is \(4, 3\), the model's is \(4, 5\)"):
        load_into(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), found)
    with pytest.raises(bn.CheckpointError, match="has no key of this model"):
        load_into(nn.Sequential(nn.PReLU()), Checkpoint(found.path, {"z": torch.ones(1)}, ()), strict=False)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    load_into(other, found, strict=False)
    assert torch.equal(other[0].weight, state["0.weight"])


def test_an_averaged_model_s_counter_is_none_of_the_model_s_keys(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net(), use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert load_into(net(), read_checkpoint(tmp_path / "swa.pt")) == "module."


def test_one_name_of_a_shared_tensor_is_enough(tmp_path):
    def shared():
        layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        return nn.Sequential(layer, norm, layer, norm)

    trained, model = randomize_statistics(shared(), 2), shared()
    save_model(trained, str(tmp_path / "net.safetensors"))
    found = read_checkpoint(tmp_path / "net.safetensors")
    assert len(found.state) < len(trained.state_dict())
    load_into(model, found)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(bn.CheckpointError, match=r"missing 1\.running_mean, 3\.running_mean"):
        load_into(model, Checkpoint(Path("x"), {k: v for k, v in found.state.items() if "mean" not in k}, ()))


def test_counters_may_be_missing(state):
    old, model = {key: value for key, value in state.items() if "num_batches" not in key}, net()
    load_into(model, Checkpoint(Path("old.pt"), old, ()))
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    assert set(updated(Checkpoint(Path("old.pt"), old, ()), model, "").state) == set(old)


def test_what_did_not_change_is_not_rounded_to_the_model_s_type(state):
    given, model = Checkpoint(Path("net.pt"), state, ()), net().bfloat16()
    load_into(model, given)
    with torch.no_grad():
        model[1].running_var.fill_(3)
    new = updated(given, model, "").state
    assert (new["1.running_var"] == 3).all()
    assert all(torch.equal(new[key], state[key]) for key in state if key != "1.running_var")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_compiled_model_takes_the_weights_of_the_model_inside(state, prefix):
    inner = net()
    model = torch.compile(inner, backend="eager")
    given = Checkpoint(Path("net.pt"), {prefix + key: value for key, value in state.items()}, ())
    assert load_into(model, given) == prefix
    assert torch.equal(inner[1].running_mean, state["1.running_mean"])
    with torch.no_grad():
        inner[1].running_mean += 1
    assert torch.equal(updated(given, model, prefix).state[prefix + "1.running_mean"], state["1.running_mean"] + 1)


def test_nothing_half_written(state, tmp_path):
    checkpoint = Checkpoint(tmp_path / "x", {"state_dict": state, "step": 1}, ("state_dict",))
    with pytest.raises(bn.CheckpointError, match="holds more than a state"):
        write_checkpoint(checkpoint, tmp_path / "x.safetensors")
    with pytest.raises(bn.OutputError, match="cannot write the weights"):
        write_checkpoint(checkpoint, tmp_path / "no" / "x.pt")
    assert list(tmp_path.iterdir()) == []
    save_file(state, tmp_path / "y.safetensors")
    assert set(load_file(tmp_path / "y.safetensors")) == set(state)


def test_weights_without_running_statistics_are_told_apart_from_those_of_another_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(dict(model.named_parameters()), tmp_path / "averaged.pt")
    with pytest.raises(bn.CheckpointError, match=r"lacks running statistics \(missing 1.running_mean, .*strict=False"):
        load_into(model, read_checkpoint(tmp_path / "averaged.pt"))


def test_what_is_no_checkpoint_is_not_told_by_a_key_alone(tmp_path):
    (tmp_path / "junk.pt").write_text("hello")  # of which pickle says KeyError: 101
    with pytest.raises(bn.CheckpointError, match="is damaged or no file of weights: KeyError 101"):
        read_checkpoint(tmp_path / "junk.pt")
