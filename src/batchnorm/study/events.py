"""What a running study tells whoever watches: plain events, for a terminal, a log or a test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Base of all events.

    ``fraction`` of the study's whole work is done (0 to 1, never falling); ``seconds_left`` is an estimate, None while
    too little is done for one; ``seconds`` have passed since this session began.
    """

    fraction: float
    seconds_left: float | None
    seconds: float


@dataclass(frozen=True)
class StudyStarted(Event):
    """Once, first: ``runs`` are known to be needed (more may follow from their results), over ``workers`` processes.

    ``expected`` is a first guess of the seconds that this session will take, made before anything was measured; 0 where
    none is made.
    """

    runs: int
    workers: int
    expected: float = 0.0


@dataclass(frozen=True)
class Noted(Event):
    """Something that whoever runs the study should know: ``text`` is one line.

    May come before :class:`StudyStarted`.
    """

    text: str


@dataclass(frozen=True)
class StudyResumed(Event):
    """A started folder goes on: ``finished`` runs are not repeated; ``dropped`` says what was cut away, else empty."""

    finished: int
    dropped: str


@dataclass(frozen=True)
class RunStarted(Event):
    """The run ``run`` (its id) begins; it takes at most ``steps`` steps."""

    run: str
    section: str
    variant: str
    seed: int
    steps: int


@dataclass(frozen=True)
class RunProgress(Event):
    """The run ``run`` has done ``step`` of at most ``steps``; ``accuracy`` is the latest, None before the first."""

    run: str
    section: str
    variant: str
    seed: int
    step: int
    steps: int
    accuracy: float | None


@dataclass(frozen=True)
class RunFinished(Event):
    """The run ``run`` is finished and its records are in the file. It stopped after ``step`` of ``steps``."""

    run: str
    section: str
    variant: str
    seed: int
    step: int
    steps: int
    accuracy: float | None
    finished_runs: int
    known_runs: int


@dataclass(frozen=True)
class StudyFinished(Event):
    """Once, last, when every run is finished."""

    runs: int
