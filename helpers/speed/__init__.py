"""The attention-speed demo: how time and memory grow with the number of tokens, with a softmax and without.

`python -m helpers.speed --help` lists the options; 08_linear_attention ends with a short run of it. `kernels` holds the
Triton kernel and needs Triton; nothing else here does.
"""

from helpers.speed.benchmark import measure
from helpers.speed.record import Record, load_records
from helpers.speed.report import draw, summarise

__all__ = ["Record", "draw", "load_records", "measure", "summarise"]
