"""What in learned statistics is worth a second look before a network is trained on the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from batchnorm.preprocessing.describing import Description

# A deviation below this share of the mean sits in the last of float32's seven digits.
_TINY_DEVIATION = 1e-6
_WIDE_SCALES = 1e6
_MOSTLY_MISSING = 0.5
# Below ten samples a feature the eigenvalues of a covariance are visibly those of the sample, not of its source.
_SAMPLES_PER_FEATURE = 10
_ILL_CONDITIONED = 1e10
_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One thing to look at: ``text`` says what it is and what may be done; ``features`` are their numbers."""

    kind: str
    severity: Literal["warning", "info"]
    text: str
    features: tuple[int, ...] = ()


def find(about: Description, dependent: Sequence[int]) -> tuple[Finding, ...]:
    """The findings about a description; ``dependent`` are features that are combinations of others."""
    found = [*_single(about), *_between(about), *_whitening(about, dependent)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))


def _single(about: Description) -> list[Finding]:
    """Of each feature alone."""
    mean, std, missing = (about.columns.get(name, ()) for name in ("mean", "std", "missing"))
    mostly = tuple(i for i, share in enumerate(missing) if share is not None and _MOSTLY_MISSING < share < 1)
    tiny = tuple(
        i
        for i, (m, s) in enumerate(zip(mean, std, strict=False))
        if m is not None and s is not None and 0 < s <= _TINY_DEVIATION * abs(m) and i not in set(about.constant)
    )
    texts: tuple[tuple[str, Literal["warning", "info"], tuple[int, ...], str, str], ...] = (
        ("empty", "warning", about.empty, "Without a single value", "statistics and results are NaN; leave these out"),
        ("constant", "info", about.constant, "Constant", "one number comes out, which tells a network nothing"),
        ("missing", "warning", mostly, "Missing in more than half of the rows", "the statistics rest on the others"),
        (
            "offset",
            "warning",
            tiny,
            "The deviation is less than a millionth of the mean",
            "that is in the last digit of float32; store such data in float64, or less an offset",
        ),
    )
    return [
        Finding(kind, severity, f"{what}: {_names(about, features)} ({then}).", features)
        for kind, severity, features, what, then in texts
        if features
    ]


def _between(about: Description) -> list[Finding]:
    """Of features beside each other."""
    found = []
    if about.samples is not None and about.samples <= 1:
        found.append(Finding("samples", "warning", "A single sample has no deviation: fit on more of them."))
    if about.estimator in ("StandardScaler", "MinMaxScaler") or str(about.parameters.get("method", "")).endswith(
        "-cor"
    ):
        return found  # those bring scales together
    stds = [(std, i) for i, std in enumerate(about.columns.get("std", ())) if std and i not in about.constant]
    if stds and max(stds)[0] > _WIDE_SCALES * min(stds)[0]:
        (least, low), (most, high) = min(stds), max(stds)
        remedy = (
            "--method pca-cor or zca-cor standardizes them first"
            if about.spectrum
            else "--method standard brings them to one"
        )
        text = (
            f"The deviations of the features span {most / least:.0e} (from {about.name(low)} to {about.name(high)}): "
            f"{remedy}."
        )
        found.append(Finding("scales", "warning", text, (low, high)))
    return found


def _whitening(about: Description, dependent: Sequence[int]) -> list[Finding]:
    spectrum = about.spectrum
    if spectrum is None:
        return []
    found = []
    if about.samples is not None and about.samples < _SAMPLES_PER_FEATURE * about.features and spectrum.shrinkage == 0:
        text = (
            f"{about.samples_text} samples are few for {about.features:,} features, "
            f"{about.samples / about.features:.2g} each: small variances are estimated too small and whitening blows "
            "them up. Fit on more, or with --shrinkage ledoit-wolf."
        )
        found.append(Finding("samples", "warning", text))
    varying = spectrum.without_variance - len(about.constant)
    if varying > 0:
        what = "direction has" if varying == 1 else "directions have"
        gone = "is dropped" if varying == 1 else "are dropped"
        beside = ", beside the constant features," if about.constant else ""
        fewer = about.samples is not None and about.samples <= about.features
        why = "there are no more samples than features" if fewer else "features are combinations of others"
        text = f"{varying:,} {what} no variance{beside} and {gone}: {why}"
        if dependent and not fewer:
            text += f" ({_names(about, dependent)})"
        found.append(Finding("rank", "info" if fewer else "warning", f"{text}.", tuple(dependent)))
    if spectrum.condition is not None and spectrum.condition > _ILL_CONDITIONED:
        text = (
            f"The condition number is {spectrum.condition:.1e}: some features are almost combinations of others, and "
            "whitening blows up the small rest. Keep fewer directions (--n-components 0.999), or add --eps."
        )
        found.append(Finding("condition", "warning", text))
    return found


def _names(about: Description, features: Sequence[int]) -> str:
    more = f" and {len(features) - _SHOWN:,} more" if len(features) > _SHOWN else ""
    return ", ".join(about.name(i) for i in features[:_SHOWN]) + more
