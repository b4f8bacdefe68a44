"""What the notebooks import to teach: checked equations, widgets, exercises and figures. Knows no topic."""

from helpers.environment import environment_report
from helpers.teaching.checks import check
from helpers.teaching.exercises import Exercise
from helpers.teaching.figures import COLORS, GREY, set_style, show
from helpers.teaching.widgets import choice, explore, slider, switch

__all__ = [
    "COLORS",
    "GREY",
    "Exercise",
    "check",
    "choice",
    "environment_report",
    "explore",
    "set_style",
    "show",
    "slider",
    "switch",
]
