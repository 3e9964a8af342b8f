"""The report of a run: one self-contained HTML page over its domains, and the words and data it is made of.

The page opens offline and loads nothing: styles, plots and plotly.js stand in the file, and its content policy lets a
browser run no other script. Whatever came from prompts, replies or models is text on it, never markup.
"""

from true_kd.report.page import build_report, save_report, write_report
from true_kd.report.reading import Chapter, Finished, find_finished, read_chapter
from true_kd.report.sentence import headline

__all__ = [
    "Chapter",
    "Finished",
    "build_report",
    "find_finished",
    "headline",
    "read_chapter",
    "save_report",
    "write_report",
]
