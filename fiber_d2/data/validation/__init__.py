"""Is a data set fit to be trained on or evaluated with? All of what is wrong, not the first.

The checks work on the raw json (or, for data sets without one, on the records), so that they can
go on where a reader has to stop. What passes without an error can be read.
"""

from .checks import CHECKS, Check, Finding
from .repair import REPAIRS, repair
from .report import format_report, report_as_dict
from .run import Options, Report, errors_after_repair, validate
from .samples import draw_samples
from .sources import KINDS, Source, source_of_dataset, source_of_json

__all__ = [
    "CHECKS",
    "KINDS",
    "REPAIRS",
    "Check",
    "Finding",
    "Options",
    "Report",
    "Source",
    "draw_samples",
    "errors_after_repair",
    "format_report",
    "repair",
    "report_as_dict",
    "source_of_dataset",
    "source_of_json",
    "validate",
]
