"""BN303 to BN305: small batches, batches that are unlike one another, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import batchnorm as bn
from batchnorm.probes.health import diagnose
from oracles.digits import batches, convnet, digits, mlp, train


def found(code, model, data, **options):
    return list(diagnose(model, data, select=[code], **options))


def normal(size: int, count: int = 4, *shape: int) -> list[Tensor]:
    return [torch.randn(size, 3, *shape) for _ in range(count)]


@pytest.mark.parametrize(("size", "small"), [(2, True), (15, True), (16, False), (64, False)])
def test_few_samples_are_a_small_batch(size, small):
    findings = found("BN303", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), normal(size))
    assert len(findings) == small
    if small:
        (finding,) = findings
        assert (finding.layer, finding.severity) == ("1", "warning")
        assert finding.numbers["samples"] == finding.numbers["values"] == size
        assert finding.numbers["relative_error"] >= (2 / (size - 1)) ** 0.5
        assert f"{size} samples a batch" in finding.message


def test_images_count_as_samples_and_the_worst_layer_is_named():
    torch.manual_seed(0)
    (finding,) = found("BN303", convnet(), batches(4, 8))
    assert finding.layer == "4"
    assert (finding.numbers["samples"], finding.numbers["values"], finding.numbers["layers"]) == (4, 64, 3)
    assert finding.numbers["relative_error"] >= (2 / 63) ** 0.5


def test_a_mask_leaves_fewer_values():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.nn.BatchNorm1d(3)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    x, mask = torch.randn(32, 3), torch.arange(32) < 5
    (finding,) = found("BN303", Masked(), [{"x": x, "mask": mask}])
    assert finding.numbers["values"] == 5
    assert not found("BN303", Masked(), [{"x": x, "mask": mask | True}])


def test_a_ragged_last_batch_is_not_a_small_batch_unless_it_cannot_be_trained_on():
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert not found("BN303", model, [*normal(32), *normal(5, 1)])
    (finding,) = found("BN303", model, [*normal(32), *normal(1, 1)])
    assert finding.numbers == {"batch": 4}
    assert "one value per channel" in finding.message


@pytest.mark.parametrize(
    ("norm", "small"),
    [
        (lambda: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=8), True),
        (lambda: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=32), False),
        (lambda: bn.nn.FrozenBatchNorm1d(3), False),
    ],
)
def test_ghosts_are_what_they_are_cut_into(norm, small):
    assert bool(found("BN303", nn.Sequential(norm()), normal(64))) == small


@pytest.mark.parametrize("norm", [lambda: bn.nn.BatchRenorm1d(3), lambda: bn.nn.SyncBatchNorm(3)])
def test_layers_that_are_made_for_small_batches(norm):
    assert not found("BN303", nn.Sequential(norm()), normal(4))


def by_class(size: int = 60) -> list[Tensor]:
    images, labels, _, _ = digits()
    return [images[labels == label][:size] for label in range(10)]


def test_batches_of_one_class_are_unlike_one_another():
    torch.manual_seed(0)
    model = train(mlp(), 200)
    (finding,) = found("BN304", model, by_class())
    assert finding.layer == "8"  # where the classes are furthest apart
    assert finding.numbers["share"] > 0.5
    assert finding.numbers["layers"] == 3
    assert not found("BN304", model, batches(60, 10))
    assert not found("BN304", model, batches(60, 9, held_out=True))


def test_a_network_that_was_trained_so_is_no_better_than_chance():
    torch.manual_seed(0)
    model, others = train(mlp(), 300, by_class=True), digits()[2:]
    assert float((model(others[0]).argmax(1) == others[1]).double().mean()) < 0.2


@pytest.mark.parametrize(("shift", "unlike"), [(0.0, 0), (0.2, 0), (1.0, 1)])
def test_domains(shift, unlike):
    data = [x + shift * (-1) ** number for number, x in enumerate(normal(64, 8, 5, 5))]
    data = [x + 1.0 * torch.randn(64, 3, 1, 1) for x in data]  # images differ as wholes
    assert len(found("BN304", nn.Sequential(nn.BatchNorm2d(3)), data)) == unlike


def test_positions_that_are_alike_do_not_make_batches_unlike():
    data = [torch.randn(16, 3, 1, 1).expand(16, 3, 32, 32) for _ in range(8)]
    assert not found("BN304", nn.Sequential(nn.BatchNorm2d(3)), data)


def test_rows_of_a_sample_count_once():
    # Tokens of a sequence as rows: each sequence has a value of its own.
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x.flatten(0, 1))

    assert not found("BN304", Rows(), [torch.randn(16, 1, 3).expand(16, 40, 3) for _ in range(8)])


def test_two_batches_are_too_few():
    assert not found("BN304", nn.Sequential(nn.BatchNorm1d(3)), [x + 5 * i for i, x in enumerate(normal(64, 2))])


class Sequences(nn.Module):
    """A convolutional network on (N, 4, L)."""

    def __init__(self, norm=nn.BatchNorm1d, bias=True):
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1, bias=bias)
        self.norm = norm(8)
        self.second = nn.Conv1d(8, 8, 3, padding=1)
        self.norm2 = norm(8)

    def forward(self, x, lengths=None):  # noqa: ARG002 - it should
        return self.norm2(self.second(self.norm(self.first(x)).relu())).mean(2)


class Told(Sequences):
    def __init__(self):
        super().__init__(bn.nn.BatchNorm1d)

    def forward(self, x, lengths):
        x = self.norm(self.first(x), lengths=lengths).relu()
        return self.norm2(self.second(x), lengths=lengths).mean(2)


def sequences(seed: int = 0, value: float = 0.0, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        lengths = torch.randint(10, 41, (16,), generator=generator)
        lengths[0] = 40
        rows = [torch.randn(int(length), 4, generator=generator) for length in lengths]
        data.append({"x": pad_sequence(rows, batch_first=True, padding_value=value).mT, "lengths": lengths})
    return data


@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("bias", [True, False])
def test_padded_sequences_are_seen_without_being_told_of(value, bias):
    data = [batch["x"] for batch in sequences(value=value)]
    (finding,) = found("BN305", Sequences(bias=bias), data)
    padded = sum(int(40 * 16 - batch["lengths"].sum()) for batch in sequences()) / (3 * 16 * 40)
    assert finding.layer == "norm"
    assert finding.numbers["share"] == pytest.approx(padded, abs=0.05)


def test_lengths_that_no_layer_is_told_of():
    (finding,) = found("BN305", Sequences(), sequences())
    assert finding.numbers["told"] == ["lengths"]
    # Noise instead of zeros: nothing is constant, only the lengths tell.
    data = [{**batch, "x": torch.randn(16, 4, 40)} for batch in sequences()]
    (finding,) = found("BN305", Sequences(), data)
    assert "by 'lengths'" in finding.message
    (finding,) = found("BN305", Sequences(), [((batch["x"], batch["lengths"]), 0) for batch in data])
    assert finding.numbers["told"] == ["lengths"]


def test_layers_that_are_told_are_well():
    assert not found("BN305", Told(), sequences())


@pytest.mark.parametrize("key", ["attention_mask", "src_key_padding_mask"])
def test_masks_by_their_names(key):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(50, 6), nn.BatchNorm1d(6)

        def forward(self, tokens, **masks):
            assert masks
            return self.norm(self.embedding(tokens).flatten(0, 1))

    real = torch.arange(20) < torch.randint(5, 21, (16, 1))
    mask = ~real if "padding" in key else real.long()
    batch = {"tokens": torch.randint(1, 50, (16, 20)), key: mask}
    (finding,) = found("BN305", Tokens(), [batch])
    assert finding.numbers["share"] == pytest.approx(1 - float(real.double().mean()))
    scattered = torch.rand(16, 20) < 0.2  # tokens hidden to be guessed are no padding
    assert not found("BN305", Tokens(), [{**batch, key: scattered}])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(16, 4, 40),
        lambda: torch.randn(16, 4, 40).relu(),
        lambda: torch.nn.functional.pad(torch.randn(16, 4, 30), (0, 10)),  # as long in each
        lambda: torch.nn.functional.pad(torch.randn(16, 4, 20), (10, 10)),  # a border
        lambda: torch.randint(0, 2, (16, 4, 40)).float(),
    ],
)
def test_what_is_not_padding(make):
    torch.manual_seed(0)
    assert not found("BN305", Sequences(), [make() for _ in range(3)])


def test_borders_of_images_are_not_padding():
    images, _, _, _ = digits()
    assert not found("BN305", convnet(), batches(60, 4))
    rows = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4))
    assert not found("BN305", rows, [images[:60].flatten(2), images[60:120].flatten(2)])


def test_unlike_calls_of_one_layer_are_not_blamed_on_the_order_of_the_data():
    def both(model, batch):
        return model(batch), model(3 + batch)

    data = normal(32, 8, 4, 4)
    (finding,) = bn.diagnose(nn.Sequential(nn.BatchNorm2d(3)), data, forward_fn=both, select=["BN304"])
    assert finding.remedy.startswith("it is called 2 times a batch: one call, or a layer for each (BN004)")
