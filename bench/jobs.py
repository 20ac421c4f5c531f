"""`jobs`: 1000 jobs at once that run, each with a caller that watches it.

One client process with four connections; a fresh server with a model on the loop that waits. After a few jobs for
warmth (not as many: what the server then holds on to would not be counted), and with nothing under way, its memory is
read; then all are begun, and when the last one runs, CPU seconds are counted and memory is read again while all still
do. A gap is what a caller sees between two heartbeats of a job that runs. There is no peer: nobody else has heartbeats
of a job.
"""

from __future__ import annotations

from bench.compare import Comparison, Figure, Way
from bench.options import Options
from bench.required import GAPS, JOB_MEMORY

COUNT, SECONDS = 1000, 10.0
# As many at once as there are jobs, whatever their number.
SERVER = ("--model=OnLoop", "--directory={dir}", "--concurrency=10000")
WAY = Way("aipod", "product", "product", (), SERVER)
FIGURES = (
    Figure(GAPS, lambda run: run["gaps_in_time"] * 100),
    Figure("p99 gap s", lambda run: run["gap_p99"], more_is_better=False),
    Figure("longest gap s", lambda run: run["gap_max"], more_is_better=False),
    Figure("server CPU s/s", lambda run: run["server_cpu_rate"], more_is_better=False),
    Figure("client CPU s/s", lambda run: run["client_cpu_rate"], more_is_better=False),
    Figure(JOB_MEMORY, lambda run: run["server_job_kb"], more_is_better=False),
    Figure("all run after s", lambda run: run["ramp"], more_is_better=False),
)


def comparisons(options: Options) -> list[Comparison]:
    count = options.jobs or (100 if options.quick else COUNT)
    seconds = options.seconds or (3.0 if options.quick else SECONDS)
    return [Comparison("1000 at once", "hold", (str(count), str(seconds), "{server}"), WAY, (), FIGURES, fresh=True)]
