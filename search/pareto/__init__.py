"""The Pareto front, the limits on it, what each step of a plan changes, and front.json."""
