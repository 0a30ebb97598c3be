"""Real steps, measured: under a limit, compared in turns, what will fit, and several ranks at once.

| file | its one job |
| --- | --- |
| `step` | a step run for real: its peak, its seconds, the limits it ran under |
| `step_outcome` | a loss that is none, an allocation that failed, the work in a batch |
| `interleaved_timing` | which of several ways is faster, on a machine that is never quite still |
| `throttle` | the memory limit under which a peak stays within a budget |
| `floors`, `forecast` | what a step needs at the least, by its graph, and which size or choice therefore fits |
| `ranks` | several processes that measure together and come to the same answer |
| `tightest_limit` | the least memory limit that costs next to no speed |
"""
