"""The claims of the measurement pages, measured on this machine and judged.

| file | its one job |
| --- | --- |
| `sizes` | sizes, and the bound that nothing exceeds |
| `training`, `products`, `by_the_doctor` | measuring: figures, no opinion |
| `verdicts` | what figures say of a claim: pure functions |
| `sections` | the table of claims |
| `section_process`, `run` | one section a process, one after another |
| `report`, `reading` | the result, and the same out of its JSON file |
"""
