"""The page's colours, once, for its text and its plots, in light and in dark.

They reach the page as CSS variables. Plots name them as ``var(--batch-0)`` and the page's script puts in the value of
the theme at hand, so that one figure serves both themes. Text keeps a contrast of at least 4.5 against its ground,
lines and bars at least 3 (a test computes both).
"""

from __future__ import annotations

GROUND: dict[str, tuple[str, str]] = {
    # name: (light, dark)
    "bg": ("#faf9f6", "#12151a"),
    "surface": ("#ffffff", "#1a1e25"),
    "sunken": ("#f1f0eb", "#20252d"),
    "ink": ("#1b2330", "#e7eaef"),
    "muted": ("#545e6c", "#a6b0bd"),
    "line": ("#dfdfd9", "#303742"),
    "grid": ("#e8e8e3", "#2a3039"),
    "accent": ("#1c57b0", "#86b6ff"),
    "good": ("#0b6b58", "#5fcdb8"),
    "caution": ("#8f4a0a", "#f0b06c"),
}

# Several series of one role are told apart by shade, then by dash. The first shade is the role's own colour.
ROLES: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (("#b8521a", "#f2a069"), ("#7d3408", "#ffd2b0"), ("#d2752f", "#c97a41")),
    "batch": (("#1f5fbf", "#78aeff"), ("#123a78", "#bcd6ff"), ("#4a8be0", "#4f88da")),
    "control": (("#7a3fa6", "#c79be8"), ("#4d2170", "#e6d2f7"), ("#a06bc8", "#9d70c2")),
    # Eight other kinds beside the three above: apart in lightness as well as in hue, each with a dash.
    "other": (
        ("#4b5563", "#aab4c2"),
        ("#0d8a7c", "#3fc9b5"),
        ("#a3325f", "#f08bb0"),
        ("#7d7a10", "#d6d15c"),
        ("#0b3f3a", "#c8f2ea"),
        ("#d0417e", "#c2487c"),
        ("#3d4a05", "#8d8f2e"),
        ("#0788b3", "#8fdcf5"),
    ),
    "data-a": (("#0d7a6f", "#4cc2b3"), ("#095047", "#a5e5dc")),
    "data-b": (("#a3325f", "#f08bb0"), ("#6f1c3d", "#f9c6d9")),
}

# From almost the ground to the colour of batch normalization: light is little in the light, dark is little in the dark.
HEAT: tuple[tuple[str, str], ...] = (
    ("#f3f2ec", "#20252d"),
    ("#c9d8ee", "#263b5c"),
    ("#8fb3e3", "#33609f"),
    ("#4a82cb", "#5c95e6"),
    ("#153f86", "#cfe1ff"),
)


def shade(role: str, occurrence: int) -> str:
    """The plot colour of the ``occurrence``-th series of ``role`` in a figure, as a CSS variable."""
    return f"var(--{role}-{occurrence % len(ROLES[role])})"


def band(colour: str) -> str:
    """A plot colour, nearly transparent: the spread over seeds."""
    return f"{colour.removesuffix(')')}-band)"


def variables(dark: bool) -> dict[str, str]:
    """Every CSS variable of a theme, without the leading dashes."""
    theme = int(dark)
    found = {name: pair[theme] for name, pair in GROUND.items()}
    for role, shades in ROLES.items():
        for index, pair in enumerate(shades):
            found[f"{role}-{index}"] = pair[theme]
            found[f"{role}-{index}-band"] = _transparent(pair[theme], 0.22 if dark else 0.16)
    found.update({f"heat-{index}": pair[theme] for index, pair in enumerate(HEAT)})
    return found


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"
