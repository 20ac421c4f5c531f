"""What is between here and a server, found out by calling it: limits, timeouts, windows; and what to change.

`examine` has the checks run side by side, each on connections of its own. A check measures by calls of `aipod.probe`
(`wire`), and says what it has found in `finding`s; where it cannot know, it says so. No check begins a job.
"""

from aipod.doctor.examine import examine
from aipod.doctor.finding import Finding, Level
from aipod.doctor.wire import Chain

__all__ = ["Chain", "Finding", "Level", "examine"]
