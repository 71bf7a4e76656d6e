"""Evaluation suites. `hadal.evals.puzzles`: the accuracy of hadal-mini on problems it has never seen."""
