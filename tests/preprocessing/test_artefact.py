"""save_model and load_model: estimator and network as one file, called with raw data; damaged and foreign files."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.export.pt2_archive import PT2ArchiveWriter

from batchnorm import DtypeError, InputError, OutputError, ShapeError, StatisticsFileError
from batchnorm.nn import BatchNorm1d
from batchnorm.preprocessing import (
    CORAL,
    MeanSubtractor,
    MinMaxScaler,
    SavedModel,
    StandardScaler,
    Whitener,
    load,
    load_model,
    save_model,
)
from batchnorm.preprocessing.saving import from_bytes

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4)) @ RNG.standard_normal((4, 4)) + 1e8
FRAME = pd.DataFrame(X, columns=["a", "b", "c", "d"])
IMAGES = torch.randint(0, 256, (12, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """A network whose class the reader of the file does not have."""

    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.norm = BatchNorm1d(inputs)
        self.drop = nn.Dropout()
        self.out = nn.Linear(inputs, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.norm(x).relu()))


def trained(inputs: int = 4) -> Head:
    torch.manual_seed(0)
    head = Head(inputs)
    head(torch.randn(50, inputs) * 2 + 1)  # running statistics that are not 0 and 1
    return head


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "model.pt2"
    save_model(target, StandardScaler().fit(FRAME), trained(), FRAME.iloc[:5])
    return target


def answer(estimator: Any, network: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return copy.deepcopy(network).eval()(torch.from_numpy(np.asarray(estimator.transform(x))).float()).numpy()


def test_raw_data_in_any_container(path: Path) -> None:
    model = load_model(path)
    assert isinstance(model, SavedModel)
    expected = answer(StandardScaler().fit(X), trained(), X)
    # Exactly, although the data lie 1e8 from zero and the network is in float32.
    for data in (FRAME, pl.DataFrame(X, schema=["a", "b", "c", "d"])):
        y = model(data)
        assert isinstance(y, np.ndarray)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    for rows in (1, 2, 7):
        np.testing.assert_allclose(model(FRAME.iloc[:rows]), expected[:rows], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        y = model(torch.from_numpy(X).requires_grad_())
    assert isinstance(y, torch.Tensor)
    assert not y.requires_grad
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    assert repr(model) == "SavedModel(StandardScaler(), (N, 4) of torch.float64)"
    assert os.listdir(path.parent) == ["model.pt2"]


def test_streams_of_raw_data(path: Path) -> None:
    model = load_model(path)
    answers = list(model(iter([FRAME.iloc[:7], FRAME.iloc[7:8], FRAME.iloc[8:]])))
    assert [len(y) for y in answers] == [7, 1, 52]
    np.testing.assert_allclose(np.concatenate(answers), model(FRAME), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="The feature names should match"):
        list(model(iter([FRAME, FRAME[["b", "a", "c", "d"]]])))


def test_the_estimator_inside_goes_on(path: Path) -> None:
    estimator = load_model(path).estimator
    expected = StandardScaler().fit(FRAME)
    pd.testing.assert_frame_equal(estimator.transform(FRAME), expected.transform(FRAME), rtol=0, atol=0)
    estimator.partial_fit(FRAME + 1)
    assert estimator.n_samples_seen_ == 120


def test_gradients_through_the_module(path: Path) -> None:
    module = load_model(path).module()
    x = torch.from_numpy(X).requires_grad_()
    module(x).sum().backward()
    assert bool(x.grad.any())
    assert {"front.mean_high", "network.out.weight"} <= set(module.state_dict())


@pytest.mark.filterwarnings("ignore")  # of the exporter, about torchvision
def test_onnx_of_what_was_saved(path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, buffer = load_model(path), io.BytesIO()
    torch.onnx.export(model.program, (torch.from_numpy(X[:3]),), buffer, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(y, model(FRAME), rtol=0, atol=1e-6)


@pytest.mark.cuda
def test_saved_and_loaded_on_a_gpu(tmp_path: Path, gpu: str) -> None:
    network = trained().to(gpu)
    save_model(tmp_path / "m", StandardScaler().fit(X), network, torch.from_numpy(X).to(gpu))
    assert all(parameter.device.type == "cuda" for parameter in network.parameters())
    expected = load_model(tmp_path / "m")(X)
    model = load_model(tmp_path / "m", device=gpu)
    assert model.device.type == "cuda"
    assert model(torch.from_numpy(X)).device.type == "cuda"
    np.testing.assert_allclose(model(X), expected, rtol=0, atol=1e-5)


def test_another_program_reads_it_without_the_class_and_without_pickle(path: Path) -> None:
    code = (
        "import pickle, sys\n"
        "def refuse(*_, **__): raise SystemExit('a pickle')\n"
        "import numpy as np, torch\n"
        "pickle.loads = pickle.load = torch.load = refuse\n"
        "from batchnorm.preprocessing import load_model\n"
        f"print(load_model({str(path)!r}).module()(torch.ones(2, 4, dtype=torch.float64) * 1e8)[0, 0].item())\n"
        f"print(torch.export.load({str(path)!r}).module()(torch.ones(2, 4, dtype=torch.float64) * 1e8)[0, 0].item())\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    expected = answer(StandardScaler().fit(X), trained(), np.full((2, 4), 1e8))[0, 0]
    assert [float(line) for line in finished.stdout.split()] == pytest.approx([expected] * 2, abs=1e-5)


def test_what_the_file_tells(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].partition("/")[0]
        data = b"".join(archive.read(name) for name in names)
        statistics = archive.read(f"{root}/extra/batchnorm.model.statistics")
        assert archive.getinfo(f"{root}/data/sample_inputs/model.pt").file_size == 0
    assert b".py" not in data  # torch notes the paths and the lines of source of every step
    assert b"self.out" not in data
    assert from_bytes(base64.b64decode(statistics), "it").n_samples_seen_ == 60


@pytest.mark.parametrize(
    "estimator",
    [MeanSubtractor(), MinMaxScaler((0, 1), clip=True), Whitener("pca", n_components=2), Whitener("zca-cor"), CORAL()],
    ids=str,
)
def test_every_estimator(estimator: Any, tmp_path: Path) -> None:
    estimator.fit(X, (X[::-1] - 1e8) * 2) if isinstance(estimator, CORAL) else estimator.fit(X)
    network = trained(estimator.transform(X).shape[1])
    save_model(tmp_path / "m", estimator, network, X[:1])
    np.testing.assert_allclose(load_model(tmp_path / "m")(X), answer(estimator, network, X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_image_bytes_into_a_network_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    scaler = StandardScaler(channel_axis=1).fit(IMAGES)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(120, 2)).to(dtype)
    save_model(tmp_path / "m", scaler, network, IMAGES[:2])
    model = load_model(tmp_path / "m", device="cpu")
    with torch.no_grad():
        expected = network(scaler.to_module()(IMAGES).to(dtype))
    assert model(IMAGES).dtype == dtype
    torch.testing.assert_close(model(IMAGES), expected)
    assert model(IMAGES.numpy()).dtype == (np.float64 if dtype == torch.float64 else np.float32)
    with pytest.raises(ShapeError, match=r"expected data of shape \(N, 3, 6, 5\), got \(N, 3, 5, 6\)"):
        model(IMAGES.mT)
    with pytest.raises(
        DtypeError, match=r"saved for torch\.uint8 and would round torch\.float32: convert the data, or"
    ):
        model(IMAGES.float())


def test_images_of_16_bits(tmp_path: Path) -> None:
    images = torch.randint(0, 2**16, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    scaler = StandardScaler(channel_axis=1).fit(images)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    save_model(tmp_path / "m", scaler, network, images.numpy())
    model = load_model(tmp_path / "m")
    np.testing.assert_allclose(model(images), answer(scaler, network, images.numpy()), rtol=0, atol=1e-6)
    with pytest.raises(DtypeError, match=r"saved for torch\.uint16 and would round torch\.int32"):
        model(images.to(torch.int32))


def test_a_network_stays_as_it_was_and_may_give_several_answers(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = trained()

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"y": self.head(x), "parts": (x.mean(), x.shape[0]), "nothing": None}

    network = Two().train()
    before = copy.deepcopy(network.state_dict())
    save_model(tmp_path / "m", StandardScaler().fit(X), network, X)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    found = load_model(tmp_path / "m")(X[:9])
    assert (found["parts"][1], found["nothing"]) == (9, None)
    np.testing.assert_allclose(found["y"], answer(StandardScaler().fit(X), network.head, X[:9]), rtol=0, atol=1e-6)
    assert isinstance(found["parts"][0], np.ndarray)


class TestData:
    def test_other_columns(self, path: Path) -> None:
        model = load_model(path)
        with pytest.raises(InputError, match="The feature names should match those that were passed during fit"):
            model(FRAME[["b", "a", "c", "d"]])
        with pytest.raises(InputError, match="The feature names should match those that were passed during fit"):
            model(FRAME.rename(columns={"d": "e"}))

    @pytest.mark.filterwarnings("ignore:X does not have valid feature names")
    def test_numbers_that_do_not_fit(self, path: Path) -> None:
        model = load_model(path)
        with pytest.raises(ShapeError, match="X has 3 features, but StandardScaler is expecting 4 features as input"):
            model(X[:, :3])
        with pytest.raises(ShapeError, match="Expected 2D array, got 3D array instead"):
            model(torch.ones(2, 2, 4))
        x = FRAME.copy()
        x.iloc[3, 1] = np.inf
        with pytest.raises(InputError, match=r"Input X contains infinity: row 3, column 1 \('b'\)"):
            model(x)
        x.iloc[3, 1] = np.nan
        assert np.isnan(model(x)).any(1).nonzero()[0].tolist() == [3]
        with pytest.raises(InputError, match="expected numbers, got str in column 'a'"):
            model(FRAME.astype(str) + " m")

    def test_sparse_data(self, tmp_path: Path) -> None:
        scaler = StandardScaler(with_mean=False).fit(scipy.sparse.csr_array(X))
        with pytest.raises(DtypeError, match="expected dense data for the network, got sparse ones"):
            save_model(tmp_path / "m", scaler, trained(), scipy.sparse.csr_array(X))
        save_model(tmp_path / "m", scaler, trained(), X)
        with pytest.raises(DtypeError, match=r"got sparse ones: X\.toarray\(\), or X\.to_dense\(\)"):
            load_model(tmp_path / "m")(scipy.sparse.csr_array(X))

    def test_data_more_precise_than_the_example(self, tmp_path: Path) -> None:
        save_model(tmp_path / "m", StandardScaler().fit(X), trained(), torch.from_numpy(X).float())
        model = load_model(tmp_path / "m")
        assert model(np.zeros((60, 4), np.float16)).shape == (60, 2)
        with pytest.raises(
            DtypeError, match=r"for torch\.float32 and would round torch\.float64: .* an example of torch"
        ):
            model(X)


class TestWhatCannotBeSaved:
    def saved(self, tmp_path: Path, network: Any = None, estimator: Any = None, example: Any = X) -> None:
        try:
            save_model(tmp_path / "m", estimator or StandardScaler().fit(X), network or trained(), example)
        finally:
            assert os.listdir(tmp_path) == []

    def test_other_objects(self, tmp_path: Path) -> None:
        with pytest.raises(DtypeError, match=r"expected a fitted estimator of batchnorm\.preprocessing, got Linear"):
            self.saved(tmp_path, estimator=nn.Linear(2, 2))
        with pytest.raises(DtypeError, match=r"expected the network to be an nn\.Module, got function"):
            self.saved(tmp_path, network=answer)
        with pytest.raises(NotFittedError):
            self.saved(tmp_path, estimator=StandardScaler())
        with pytest.raises(InputError, match="cannot save a Mine of"):
            self.saved(
                tmp_path, estimator=type("Mine", (StandardScaler,), {"__init__": StandardScaler.__init__})().fit(X)
            )
        with pytest.raises(ShapeError, match="X has 3 features, but StandardScaler is expecting 4"):
            self.saved(tmp_path, example=X[:, :3])

    def test_a_network_for_another_width(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError,
            match=r"the Linear does not take what the estimator gives, \(N, 4\): mat1 and mat2 shapes cannot",
        ):
            self.saved(tmp_path, network=nn.Linear(5, 2))
        with pytest.raises(InputError, match=r"the MultiheadAttention does not take what .* gives, \(N, 4\):"):
            self.saved(tmp_path, network=nn.MultiheadAttention(4, 1))

    def test_a_network_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the LazyLinear has layers without weights yet: run a batch through it"):
            self.saved(tmp_path, network=nn.LazyLinear(2))
        with pytest.raises(InputError, match="the Linear cannot be copied for export: Cannot copy out of meta tensor"):
            self.saved(tmp_path, network=nn.Linear(4, 2, device="meta"))

    def test_networks_that_are_no_program_of_any_batch(self, tmp_path: Path) -> None:
        class Branching(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum() > 0 else -x

        class Five(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.reshape(5, -1)

        class Rolling(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + torch.rand_like(x)

        for network, text in (
            (Branching(), "the Branching cannot be exported for any number of rows: "),
            (Five(), "the Five cannot be exported for any number of rows: "),
            (Rolling(), "the Rolling does not give the same answer twice, or not when exported"),
        ):
            with pytest.raises(InputError, match=text) as caught:
                self.saved(tmp_path, network=network, example=X[:5])
            assert "\n" not in str(caught.value)

    def test_what_torch_writes_and_cannot_read(self, tmp_path: Path) -> None:
        class Named(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
                return x * 2, "twice"

        with pytest.raises(InputError, match="the file of the Named could not be read again, let it hold plain"):
            self.saved(tmp_path, network=Named())

    def test_places_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(OutputError, match=r"cannot write the model to '.*nowhere/m': No such file or directory"):
            save_model(tmp_path / "nowhere" / "m", StandardScaler().fit(X), nn.Linear(4, 2), X)
        with pytest.raises(OutputError, match="cannot write the model to '': it names no file"):
            save_model("", StandardScaler().fit(X), nn.Linear(4, 2), X)
        (tmp_path / "m").write_bytes(b"the old one")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot write the model to '.*m': No space left on device"):
            save_model(tmp_path / "m", StandardScaler().fit(X), nn.Linear(4, 2), X)
        assert (tmp_path / "m").read_bytes() == b"the old one"
        assert os.listdir(tmp_path) == ["m"]


class Touch:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def rewritten(path: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive with other records, whose checksums are right."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with PT2ArchiveWriter(str(target)) as writer:
        for name, data in records.items():
            if not name.startswith((".data/", "archive_", "byteorder")):  # which the writer adds
                writer.write_bytes(name, data)
    return target


def unchanged(_: dict[str, bytes]) -> None:
    pass


def edited(name: str, edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        content = json.loads(records[name])
        edit(content)
        records[name] = json.dumps(content).encode()

    return change


HEADER, CONFIG = "extra/batchnorm.model.json", "data/weights/model_weights_config.json"


class TestFiles:
    @pytest.mark.parametrize("kind", ["empty", "text", "half", "cut", "pickle", "statistics", "missing", "folder"])
    def test_what_is_no_model(self, kind: str, path: Path, tmp_path: Path) -> None:
        whole, target = path.read_bytes(), tmp_path / "m"
        if kind == "statistics":
            StandardScaler().fit(X).save(target)
        elif kind == "folder":
            target.mkdir()
        elif kind != "missing":
            texts = {"empty": b"", "text": b"a,b\n1,2\n", "half": whole[: len(whole) // 2], "cut": whole[:-1]}
            target.write_bytes(texts.get(kind, pickle.dumps([1])))
        reason = {"missing": "No such file or directory", "folder": "Is a directory"}.get(
            kind, "is truncated, damaged or"
        )
        with pytest.raises(StatisticsFileError, match=reason) as caught:
            load_model(target)
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_device_that_is_not_there(self, path: Path) -> None:
        for device in ("nowhere", f"cuda:{torch.cuda.device_count()}"):
            with pytest.raises(InputError, match=f"cannot use the device '{device}': ") as caught:
                load_model(path, device=device)
            assert "\n" not in str(caught.value)

    def test_a_model_is_no_statistics_file(self, path: Path) -> None:
        with pytest.raises(StatisticsFileError, match="is truncated, damaged or no safetensors file"):
            load(path)

    def test_every_changed_byte_is_found_or_harmless(self, path: Path, tmp_path: Path) -> None:
        whole = path.read_bytes()
        expected = load_model(path)(FRAME)
        found = 0
        for position in np.random.default_rng(0).integers(0, len(whole), 150):
            data = bytearray(whole)
            data[position] ^= 1 << int(position) % 8
            (tmp_path / "m").write_bytes(data)
            try:
                y = load_model(tmp_path / "m")(FRAME)
            except StatisticsFileError as error:
                found += 1
                assert len(str(error).splitlines()) == 1  # noqa: PT017 -- either this or the same numbers
            else:
                np.testing.assert_array_equal(y, expected)  # in padding, a time stamp
        assert found > 75

    def test_a_foreign_program(self, path: Path, tmp_path: Path) -> None:
        program = torch.export.export(nn.Linear(4, 2), (torch.ones(2, 4),))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        (tmp_path / "m").write_bytes(buffer.getvalue())
        target = rewritten(path, tmp_path / "same.pt2", unchanged)
        assert load_model(target)(FRAME).shape == (60, 2)
        with pytest.raises(StatisticsFileError, match=r"is no model of batchnorm\.preprocessing: write it again with"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                edited(HEADER, lambda header: header.update(version=2)),
                "is of version 2 of the format, this package reads 1",
            ),
            (edited(HEADER, lambda header: header.pop("dtype")), "holds a program that torch cannot read: 'dtype'"),
            (
                edited("models/model.json", lambda model: model.pop("graph_module")),
                "holds a program that torch cannot read",
            ),
            (edited("models/model.json", lambda model: model["schema_version"].update(major=999)), "torch cannot read"),
            (lambda records: records.pop("models/model.json"), "holds a program that torch cannot read"),
            (lambda records: records.update({"extra/batchnorm.model.statistics": b"!"}), "holds a program that torch"),
            (
                lambda records: records.update({"extra/batchnorm.model.statistics": base64.b64encode(b"{}")}),
                "the estimator in '.*' is truncated, damaged or no safetensors file",
            ),
            (
                lambda records: records.update({"data/aotinductor/model/x.so": b""}),
                r"other foreign parts: \['data/aoti",
            ),
            (
                lambda records: records.update({"data/weights/model.pt": b""}),
                r"pickles, .*\['data/weights/model\.pt'\]",
            ),
            (
                lambda records: records.update({"data/constants/opaque_obj_0": b""}),
                r"\['data/constants/opaque_obj_0'\]",
            ),
            (lambda records: records.update({"models/other.json": b"{}"}), r"foreign parts: \['models/other\.json'\]"),
        ],
    )
    def test_rewritten(self, change: Callable[[dict[str, bytes]], None], text: str, path: Path, tmp_path: Path) -> None:
        with pytest.raises(StatisticsFileError, match=text) as caught:
            load_model(rewritten(path, tmp_path / "m.pt2", change))
        assert "\n" not in str(caught.value)

    @pytest.mark.filterwarnings("ignore")
    def test_torch_unpickles_what_is_refused_here(self, path: Path, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(Touch(tmp_path / "trace"), buffer)

        def in_weights(records: dict[str, bytes]) -> None:
            records["data/weights/weight_0"] = buffer.getvalue()
            edited(CONFIG, lambda config: next(iter(config["config"].values())).update(use_pickle=True))(records)

        def in_inputs(records: dict[str, bytes]) -> None:
            records["data/sample_inputs/model.pt"] = buffer.getvalue()

        for change in (in_weights, in_inputs):
            target = rewritten(path, tmp_path / "m.pt2", change)
            with pytest.raises(StatisticsFileError, match="holds pickles, compiled code or other foreign parts"):
                load_model(target)
            assert not (tmp_path / "trace").exists()
            with pytest.raises(Exception):  # noqa: B017 -- what comes of it does not matter
                torch.export.load(target)
            (tmp_path / "trace").unlink()  # torch.export.load alone has run it
