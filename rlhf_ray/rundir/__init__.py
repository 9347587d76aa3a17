"""The pieces of a run's folder: durable files, state trees, manifests, the lock and metrics.jsonl."""
