"""A plan in, a score out: assembled, run on the engine that ships it, raced, confirmed, in a process of its own."""
