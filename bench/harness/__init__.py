"""What the benchmarks share; a benchmark itself has its cases, its ways, what it measures, and its goals.

A *case* is what is carried or asked, a *way* is how: a transport, or a mode of the engine. A *record* has the
*figures* of one case by one way, a value for each round or request; the *results* are all records of a run. A
*worker* is a process that does as it is told.
"""
