"""The Optuna study: its storage, its queue, its loop."""
