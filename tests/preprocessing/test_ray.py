"""Ray Datasets on a real cluster of this machine, two workers: fit, transform, preprocessors, files, lost workers."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.preprocessing import (
    CORAL,
    MeanSubtractor,
    MinMaxScaler,
    StandardScaler,
    Whitener,
    fit_files_on_ray,
    ray_dataset,
    transform_files_on_ray,
)
from batchnorm.preprocessing.distributed import ray_data
from ray_cluster import cluster, lock_of

pytestmark = [
    # Ray's own, of its sockets and files and of its own deprecations.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    MinMaxScaler(),
    Whitener("pca"),
    Whitener("zca-cor", shrinkage="ledoit-wolf"),
    Whitener("cholesky"),
]
NAMES = list("abcde")
FRAME = pd.DataFrame(np.random.default_rng(0).standard_normal((600, 5)) * [1, 2, 3, 4, 5] + 1e6, columns=NAMES)
FRAME.iloc[::17, 2] = np.nan
FRAME["weight"] = np.random.default_rng(1).integers(0, 3, 600)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ray.data on a cluster of its own."""
    import ray.data

    with cluster(lock_of(tmp_path_factory)) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield ray.data


def learned(estimator: Any) -> dict[str, Any]:
    """The statistics by name, without samples that a whitener may have kept as such."""
    stats = estimator._stats
    return (stats.whole() if isinstance(estimator, Whitener) else stats).to_dict()


def assert_same_statistics(estimator: Any, whole: Any) -> None:
    assert estimator.n_features_in_ == whole.n_features_in_
    np.testing.assert_array_equal(estimator.n_samples_seen_, whole.n_samples_seen_)
    mine, theirs = learned(estimator), learned(whole)
    for name, tensor in mine.items():
        if name != "mean_low":  # the rounding of the mean itself
            scale = np.abs(theirs[name].numpy()).max()
            np.testing.assert_allclose(tensor.numpy(), theirs[name].numpy(), rtol=1e-12, atol=1e-12 * scale)


def fresh(estimator: Any) -> Any:
    return type(estimator)(**estimator.get_params())


class TestFit:
    @pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
    def test_equals_one_process(self, ray: Any, estimator: Any) -> None:
        whole = fresh(estimator).fit(FRAME[NAMES], sample_weight=FRAME["weight"])
        for blocks in (1, 13):
            dataset = ray.from_pandas(FRAME).repartition(blocks)
            found = fresh(estimator).fit(ray_dataset(dataset, weights="weight"))
            assert list(found.feature_names_in_) == NAMES
            assert_same_statistics(found, whole)

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(cuts=st.lists(st.integers(0, 60), max_size=12), order=st.randoms(use_true_random=False))
    def test_any_partitioning(self, ray: Any, cuts: list[int], order: Any) -> None:
        """Blocks of any size, empty ones too, in any order."""
        table = FRAME[:60]
        bounds = [0, *sorted(cuts), 60]
        blocks = [pa.Table.from_pandas(table[a:b], preserve_index=False) for a, b in itertools.pairwise(bounds)]
        order.shuffle(blocks)
        found = StandardScaler().fit(ray_dataset(ray.from_arrow(blocks), weights="weight"))
        assert_same_statistics(found, StandardScaler().fit(table[NAMES], sample_weight=table["weight"]))

    def test_many_blocks_are_merged_in_a_tree(self, ray: Any) -> None:
        found = Whitener().fit(ray.from_pandas(FRAME[NAMES]).repartition(80))
        assert_same_statistics(found, Whitener().fit(FRAME[NAMES]))

    def test_offset_of_1e8(self, ray: Any) -> None:
        rng = np.random.default_rng(0)
        x = (rng.standard_normal((900, 3)) + 1e8).astype(np.float32)
        found = StandardScaler().fit(ray.from_numpy(np.array_split(x, 9)))
        np.testing.assert_allclose(found.var_, x.astype(np.longdouble).var(0).astype(float), rtol=1e-12)
        np.testing.assert_allclose(found.mean_, x.astype(np.longdouble).mean(0).astype(float), rtol=1e-15)

    def test_a_column_of_arrays(self, ray: Any) -> None:
        images = np.random.default_rng(0).standard_normal((40, 3, 4, 4)).astype(np.float32)
        dataset = ray.from_numpy(np.array_split(images, 4))
        found = StandardScaler(channel_axis=1).fit(dataset)
        assert_same_statistics(found, StandardScaler(channel_axis=1).fit(images))
        out = np.stack([row["data"] for row in found.transform(dataset).take_all()])
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, found.transform(images))
        lists = ray.from_arrow(pa.table({"label": ["x"] * 40, "embedding": list(images.reshape(40, -1))}))
        found = Whitener("zca").fit(ray_dataset(lists, "embedding"))
        assert_same_statistics(found, Whitener("zca").fit(images.reshape(40, -1)))

    def test_large_statistics_are_merged_two_by_two(self, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_data, "_LARGE", 10)
        monkeypatch.setattr(ray_data, "_IN_FLIGHT", 2)
        found = Whitener(solver="eigh").fit(ray.from_pandas(FRAME[NAMES]).repartition(11))
        assert_same_statistics(found, Whitener(solver="eigh").fit(FRAME[NAMES]))

    def test_few_samples_of_many_features(self, ray: Any) -> None:
        x = np.random.default_rng(0).standard_normal((40, 60))
        for solver in ("auto", "gram"):
            whole = Whitener(solver=solver).fit(x)
            for blocks in (3, 20):
                found = Whitener(solver=solver).fit(ray.from_numpy(np.array_split(x, blocks)))
                np.testing.assert_allclose(found.explained_variance_, whole.explained_variance_, rtol=1e-11)
                np.testing.assert_allclose(np.abs(found.transform(x)), np.abs(whole.transform(x)), atol=1e-10)

    def test_integers_booleans_nulls_and_all_missing(self, ray: Any) -> None:
        blocks = [
            pa.table({"i": pa.array([1, None, 3]), "b": [True, False, True], "n": pa.nulls(3)}),
            pa.table({"i": pa.array([4, 5]), "b": [False, None], "n": pa.array([None, 2.5])}),
        ]
        found = StandardScaler().fit(ray.from_arrow(blocks))
        np.testing.assert_allclose(found.mean_, [3.25, 0.5, 2.5], rtol=1e-15)
        assert found.n_samples_seen_.tolist() == [4, 4, 1]
        with pytest.warns(RuntimeWarning, match="saw only NaN in feature 'n'"):
            StandardScaler().fit(ray.from_arrow(blocks[:1]))

    def test_partial_fit_goes_on(self, ray: Any) -> None:
        scaler = StandardScaler().partial_fit(FRAME[NAMES][:100])
        scaler.partial_fit(ray.from_pandas(FRAME[NAMES][100:]).repartition(3))
        assert_same_statistics(scaler, StandardScaler().fit(FRAME[NAMES]))
        before = dict(vars(scaler))
        with pytest.raises(bn.ShapeError, match="X has 2 features, but StandardScaler is expecting 5"):
            scaler.partial_fit(ray.from_pandas(FRAME[NAMES[:2]]))
        with pytest.raises(bn.InputError, match="expected 'a', got 'z'"):
            scaler.partial_fit(ray.from_pandas(FRAME[NAMES].rename(columns={"a": "z"})))
        assert vars(scaler) == before

        whitener = Whitener(shrinkage="ledoit-wolf").partial_fit(FRAME[NAMES][:100])
        with pytest.raises(bn.InputError, match="statistics of its own from the first batch on"):
            whitener.set_params(shrinkage=None).partial_fit(ray.from_pandas(FRAME[NAMES][100:]))

    def test_two_domains(self, ray: Any) -> None:
        source, target = FRAME[NAMES].dropna(), FRAME[NAMES].dropna() * 2 + 1
        spread = [ray.from_pandas(frame).repartition(4) for frame in (source, target)]
        found, whole = CORAL().fit(*spread), CORAL().fit(source, target)
        np.testing.assert_allclose(found.matrix_, whole.matrix_, rtol=1e-9, atol=1e-9)
        out = found.transform(spread[0]).to_pandas().sort_values("a")
        np.testing.assert_allclose(out.astype(float), whole.transform(source).sort_values("a"), rtol=1e-12)
        with pytest.raises(bn.ShapeError, match="target: X has 4 features, but CORAL is expecting 5"):
            CORAL().fit(spread[0], spread[1].drop_columns(["e"]))

    def test_an_iterator_is_read_here(self, ray: Any) -> None:
        dataset = ray.from_pandas(FRAME).repartition(4)
        shard = dataset.iterator()  # what ray.train.get_dataset_shard gives
        found = StandardScaler().fit(ray_dataset(shard, NAMES, weights="weight"))
        assert list(found.feature_names_in_) == NAMES
        assert_same_statistics(found, StandardScaler().fit(FRAME[NAMES], sample_weight=FRAME["weight"]))
        out = list(found.transform(ray_dataset(shard, NAMES)))
        np.testing.assert_allclose(np.concatenate(out), found.transform(FRAME[NAMES]), rtol=1e-12)


BAD = {
    "text": (FRAME.assign(s="x"), {}, bn.InputError, r"in a block of \d+ rows: expected numbers in column 's', got "),
    "infinite": (FRAME.assign(c=np.inf), {}, bn.InputError, r"contains infinity: row 0, column 2 \('c'\)"),
    "negative": (FRAME.assign(weight=-1), {"weights": "weight"}, bn.InputError, "finite and not negative, got -1.0"),
    "no weight": (FRAME.assign(weight=0), {"weights": "weight"}, bn.InputError, "all are zero"),
    "missing": (FRAME, {"columns": ["a", "q"]}, bn.InputError, "expected a column 'q', the data have 'a', 'b', 'c'"),
    "weights": (FRAME, {"weights": "q"}, bn.InputError, "expected a column 'q'"),
    "only weights": (FRAME[["weight"]], {"weights": "weight"}, bn.InputError, "at least one column of features"),
    "nothing": (FRAME[:0], {}, bn.ShapeError, r"Found no samples in the \w*Dataset: 0 sample\(s\)"),
    "huge": (FRAME.assign(a=np.linspace(-1e200, 1e200, 600)), {}, bn.InputError, "overflow float64; rescale"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", list(BAD))
    def test_in_fit(self, ray: Any, case: str) -> None:
        frame, choice, kind, message = BAD[case]
        scaler = StandardScaler().fit(np.eye(3))
        before = dict(vars(scaler))
        with pytest.raises(kind, match=message) as raised:
            scaler.fit(ray_dataset(ray.from_pandas(frame).repartition(3), **choice))
        assert "\n" not in str(raised.value)
        assert vars(scaler) == before

    def test_columns_that_change_between_blocks(self, ray: Any) -> None:
        blocks = [pa.table({"a": [1.0], "b": [2.0]}), pa.table({"b": [1.0], "a": [2.0]})]
        dataset = ray.from_arrow(blocks)
        np.testing.assert_array_equal(StandardScaler().fit(ray_dataset(dataset, ["a", "b"])).mean_, [1.5, 1.5])
        # Where the columns of the whole are not known beforehand, each block has its own.
        unknown = dataset.map_batches(lambda table: table, batch_format="pyarrow", batch_size=None)
        with pytest.raises(bn.InputError, match=r"same columns in all blocks, got \[.*\] after \[.*\]: choose with"):
            StandardScaler().fit(unknown)
        with pytest.raises(bn.InputError, match="expected a column 'b'"):
            StandardScaler().fit(ray.from_arrow([pa.table({"a": [1.0], "b": [2.0]}), pa.table({"a": [1.0]})]))

    def test_arrays_that_do_not_fit(self, ray: Any) -> None:
        ragged = ray.from_arrow(pa.table({"x": [[1.0, 2.0], [1.0]], "y": [1.0, 2.0]}))
        with pytest.raises(bn.ShapeError, match=r"arrays of one shape in column 'x', got \(1,\) and \(2,\)"):
            StandardScaler().fit(ray_dataset(ragged, "x"))
        with pytest.raises(bn.InputError, match="a single column of arrays, got arrays in 'x' beside others"):
            StandardScaler().fit(ragged)
        images = ray.from_numpy(np.zeros((4, 3, 2, 2)))
        with pytest.raises(bn.ShapeError, match="Expected 2D array, got 4D array"):
            StandardScaler().fit(images)

    def test_other_mistakes(self, ray: Any) -> None:
        with pytest.raises(bn.InputError, match=r"as one of its columns.*ray_dataset\(dataset, weights="):
            StandardScaler().fit(ray.from_pandas(FRAME), sample_weight=np.ones(600))
        with pytest.raises(bn.DtypeError, match="expected a Ray Dataset, got a list"):
            ray_dataset([1, 2])
        scaler = StandardScaler().fit(FRAME[NAMES])
        with pytest.raises(bn.InputError, match="expected a column 'c', the data have 'a', 'b'"):
            scaler.transform(ray.from_pandas(FRAME[["a", "b"]]))

    def test_in_transform_ray_s_error_tells_ours(self, ray: Any) -> None:
        scaler = StandardScaler().fit(FRAME[NAMES])
        with pytest.raises(Exception, match=r"InputError: Input X contains infinity: row 0, column 1 \('b'\)"):
            scaler.transform(ray.from_pandas(FRAME.assign(b=np.inf))).take_all()


class TestTransform:
    @pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
    def test_there_and_back(self, ray: Any, estimator: Any) -> None:
        frame = FRAME[NAMES].dropna().astype(np.float32 if "Min" in str(estimator) else float)
        estimator = fresh(estimator).fit(frame)
        text = [f"row {i}" for i in range(len(frame))]
        dataset = ray.from_pandas(frame.assign(text=text)).repartition(3)
        out = estimator.transform(dataset)
        found = out.to_pandas().set_index("text").loc[text]
        assert list(found) == list(estimator.get_feature_names_out())
        assert set(map(str, found.dtypes)) <= {"float32", "float64", "float[pyarrow]", "double[pyarrow]"}
        np.testing.assert_allclose(found.astype(float), estimator.transform(frame), rtol=1e-12, atol=1e-12)
        back = estimator.inverse_transform(out).to_pandas().set_index("text").loc[text]
        assert list(back) == NAMES
        np.testing.assert_allclose(back.astype(float), frame, rtol=1e-6)

    def test_is_lazy_and_leaves_the_others_alone(self, ray: Any, tmp_path: Path) -> None:
        marker = tmp_path / "computed"

        def note(table: Any) -> Any:
            marker.touch()
            return table

        scaler = StandardScaler().fit(FRAME[NAMES])
        features = {name: [1.0, None] for name in NAMES}
        table = pa.table({"id": ["x", None], **features, "when": pa.array([1, 2], "date32")})
        out = scaler.transform(ray.from_arrow(table).map_batches(note, batch_format="pyarrow"))
        assert not marker.exists()
        assert out.schema().names == table.column_names
        (found,) = out.iter_batches(batch_format="pyarrow")
        assert found.select(["id", "when"]).equals(table.select(["id", "when"]))
        np.testing.assert_array_equal(np.isnan(found.column("a").to_numpy()), [False, True])
        scaler.set_output(transform="pandas")
        with pytest.raises(
            bn.InputError, match=r"set_output asks for 'pandas' frames: use set_output\(transform=.default"
        ):
            scaler.transform(ray.from_arrow(table))

    def test_a_name_that_is_taken(self, ray: Any) -> None:
        whitener = Whitener().fit(FRAME[NAMES].dropna())
        dataset = ray.from_pandas(FRAME[NAMES].assign(whitener1=0.0))
        with pytest.raises(Exception, match="a column 'whitener1' is there already"):
            whitener.transform(dataset).take_all()


class TestPreprocessor:
    def test_fits_and_transforms(self, ray: Any) -> None:
        dataset = ray.from_pandas(FRAME.assign(text="x")).repartition(3)
        plain = StandardScaler()
        preprocessor = plain.to_ray_preprocessor(["a", "b"], weights="weight")
        assert preprocessor.fit_status().name == "NOT_FITTED"
        with pytest.raises(RuntimeError, match="`fit` must be called before"):
            preprocessor.transform(dataset)
        found = preprocessor.fit_transform(dataset).to_pandas()
        assert not plain.__sklearn_is_fitted__()
        assert preprocessor.fit_status().name == "FITTED"
        whole = StandardScaler().fit(FRAME[["a", "b"]], sample_weight=FRAME["weight"])
        assert list(found) == [*NAMES, "weight", "text"]
        np.testing.assert_allclose(
            found[["a", "b"]].astype(float), whole.transform(FRAME[["a", "b"]]), rtol=1e-12, atol=1e-12
        )
        np.testing.assert_array_equal(found["d"], FRAME["d"])
        again = type(preprocessor).deserialize(preprocessor.serialize())
        assert_same_statistics(again.estimator, whole)

    def test_batches_of_all_kinds_and_new_columns(self, ray: Any) -> None:
        frame = FRAME[NAMES].dropna()[:20]
        whitener = Whitener().fit(frame)
        preprocessor = whitener.to_ray_preprocessor(NAMES, [f"out{i}" for i in range(5)])
        expected = whitener.transform(frame).to_numpy()
        new = preprocessor.transform_batch(frame)
        assert list(new) == [*NAMES, *preprocessor.get_output_columns()]
        assert new.index.equals(frame.index)
        np.testing.assert_array_equal(new[preprocessor.get_output_columns()], expected)
        arrays = preprocessor.transform_batch({name: frame[name].to_numpy() for name in NAMES})
        np.testing.assert_array_equal(np.stack([arrays[f"out{i}"] for i in range(5)], 1), expected)
        table = preprocessor.transform_batch(pa.Table.from_pandas(frame))
        np.testing.assert_array_equal(table.column("out3").to_numpy(), expected[:, 3])
        assert_frame = preprocessor.transform(ray.from_pandas(frame)).to_pandas()
        np.testing.assert_array_equal(assert_frame["out0"], expected[:, 0])
        with pytest.raises(bn.InputError, match="expected 5 output columns, got 1: 'y'"):
            whitener.to_ray_preprocessor(NAMES, "y").transform_batch(frame)

    def test_in_a_chain(self, ray: Any) -> None:
        from ray.data.preprocessors import Chain, Concatenator

        frame = FRAME[NAMES].dropna()
        chain = Chain(
            StandardScaler().to_ray_preprocessor(NAMES),
            Concatenator(columns=NAMES, output_column_name="x"),
            Whitener("zca").to_ray_preprocessor("x"),
        )
        found = np.stack([row["x"] for row in chain.fit_transform(ray.from_pandas(frame)).take_all()])
        scaled = StandardScaler().fit_transform(frame)
        np.testing.assert_allclose(found, Whitener("zca").fit_transform(scaled.to_numpy()), rtol=1e-9, atol=1e-9)


class TestLostWorkers:
    def test_one_is_killed_half_way(self, ray: Any, tmp_path: Path) -> None:
        """The worker that meets row 300 first is killed while it learns; its blocks are learned again, once."""
        marker, pids = tmp_path / "killed", tmp_path / "pids"
        pids.mkdir()

        def deadly(table: Any) -> Any:
            (pids / str(os.getpid())).touch()
            if 300 in table.column("row").to_pylist() and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
            return table

        frame = FRAME.assign(row=np.arange(600))
        dataset = ray.from_pandas(frame).repartition(30)
        deadlier = dataset.map_batches(deadly, batch_format="pyarrow", batch_size=None)
        found = StandardScaler().fit(ray_dataset(deadlier, NAMES, "weight"))
        assert marker.exists()
        assert len(list(pids.iterdir())) >= 2
        assert_same_statistics(found, StandardScaler().fit(FRAME[NAMES], sample_weight=FRAME["weight"]))
        marker.unlink()
        out = found.transform(deadlier).to_pandas().sort_values("row")
        assert marker.exists()
        np.testing.assert_allclose(out["a"], found.transform(FRAME[NAMES])["a"], rtol=1e-12)

    def test_one_is_killed_while_it_merges(self, ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray as engine

        marker, merged = str(tmp_path / "killed"), ray_data._merged

        def deadly(*blocks: Any) -> Any:
            if len(blocks) > 3 and not os.path.exists(marker):
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return merged(*blocks)

        usual = ray_data._merge_task()
        task = engine.remote(num_returns=2, max_retries=usual._default_options["max_retries"])(deadly)
        monkeypatch.setattr(ray_data, "_merge_task", lambda: task)
        found = Whitener().fit(ray.from_pandas(FRAME[NAMES]).repartition(20))
        assert os.path.exists(marker)
        assert_same_statistics(found, Whitener().fit(FRAME[NAMES]))


class TestFiles:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        for number, start in enumerate(range(0, 600, 150)):
            part = FRAME[start : start + 150]
            for kind in ("parquet", "csv", "npy"):
                (tmp_path / kind).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pandas(part, preserve_index=False), tmp_path / f"parquet/{number}.parquet")
            part.to_csv(tmp_path / f"csv/{number}.csv", index=False)
            np.save(tmp_path / f"npy/{number}.npy", part[NAMES].to_numpy())
        return tmp_path

    @pytest.mark.parametrize("kind", ["parquet", "csv", "npy"])
    @pytest.mark.usefixtures("ray")
    def test_there_and_back(self, files: Path, kind: str) -> None:
        flat = kind != "npy"
        choice: dict[str, Any] = {"columns": NAMES, "weights": "weight"} if flat else {}
        scaler = fit_files_on_ray(StandardScaler(), files / kind / f"*.{kind}", **choice)
        whole = StandardScaler().fit(FRAME[NAMES], sample_weight=FRAME["weight"] if flat else None)
        assert_same_statistics(scaler, whole)
        transform_files_on_ray(scaler, files / kind, files / "out")
        transform_files_on_ray(scaler, files / "out", files / "back", inverse=True)
        written = sorted((files / "back").rglob(f"*.{kind}"))
        assert written
        if kind == "npy":
            back = np.concatenate([np.load(path) for path in written])
        else:
            read = pd.read_parquet if kind == "parquet" else pd.read_csv
            frames = pd.concat([read(path) for path in written])
            assert list(frames) == [*NAMES, "weight"]
            back = frames[NAMES].to_numpy()
        key = np.argsort(back[:, 0])
        np.testing.assert_allclose(back[key], FRAME[NAMES].sort_values("a").to_numpy(), rtol=1e-12)
        assert sorted(path.name for path in files.iterdir()) == sorted({"parquet", "csv", "npy", "out", "back"})

    @pytest.mark.usefixtures("ray")
    def test_mistakes(self, files: Path) -> None:
        with pytest.raises(bn.InputError, match=r"expected files at .*none\.parquet', found none"):
            fit_files_on_ray(StandardScaler(), files / "none.parquet")
        with pytest.raises(bn.InputError, match=r"expected files of parquet, csv, npy, got .*_ray\.py"):
            fit_files_on_ray(StandardScaler(), __file__)
        (files / "empty").mkdir()
        with pytest.raises(bn.InputError, match=r"expected files of parquet, csv, npy in .*, found none"):
            fit_files_on_ray(StandardScaler(), files / "empty")
        scaler = StandardScaler().fit(FRAME[NAMES])
        with pytest.raises(bn.OutputError, match="it exists already, name a new folder"):
            transform_files_on_ray(scaler, files / "csv", files / "npy")
        FRAME.assign(b=np.inf).to_csv(files / "infinite.csv", index=False)
        with pytest.raises(bn.InputError, match=r"contains infinity: row 0, column 1 \('b'\)") as raised:
            transform_files_on_ray(scaler, files / "infinite.csv", files / "out")
        assert "\n" not in str(raised.value)
        with pytest.raises(bn.InputError, match="expected a column 'q'"):
            fit_files_on_ray(StandardScaler(), files / "parquet", columns=["a", "q"])
        for kind in ("parquet", "csv", "npy"):
            (files / f"broken.{kind}").write_bytes(b"1,2\n1,2,3\n" * 9)
            with pytest.raises(bn.InputError, match=rf"cannot read .*broken\.{kind} on Ray: ") as raised:
                fit_files_on_ray(StandardScaler(), files / f"broken.{kind}")
            assert "\n" not in str(raised.value)
        assert not list(files.glob("*out*"))
        assert not list(files.glob(".*"))


@pytest.mark.usefixtures("ray")
def test_the_examples_of_the_page_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed-data.md"
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    restored = names["restored"].to_pandas().sort_values("id")
    np.testing.assert_allclose(restored["a"], np.arange(1000) / 7, rtol=1e-12, atol=1e-12)
    white = np.stack([row["x"] for row in names["white"].take_all()])
    np.testing.assert_allclose(white.T @ white / 1000, np.eye(2), atol=1e-10)
    assert names["on_every_rank"](white) is not None


def test_ray_is_not_imported_before_it_is_used() -> None:
    code = (
        "import sys, numpy as np\n"
        "from batchnorm.preprocessing import StandardScaler\n"
        "StandardScaler().fit_transform(np.eye(3))\n"
        "print('ray' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert finished.stdout.split() == ["False"], finished.stderr


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(bn.MissingDependencyError, match=re.escape("pip install 'batchnorm[ray]'")):
        fit_files_on_ray(StandardScaler(), "x.parquet")
    with pytest.raises(bn.MissingDependencyError, match="need ray"):
        StandardScaler().to_ray_preprocessor()
