"""The files of a run directory: scores, facts, fingerprints; crash-safe and shared between runs."""
