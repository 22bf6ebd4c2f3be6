"""Training: the loop, its steps (eager, compiled, of many replicas), and what a run writes down."""
