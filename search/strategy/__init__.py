"""Which plan to score next: the space of plans, the schedule, the damage model, TPE."""
