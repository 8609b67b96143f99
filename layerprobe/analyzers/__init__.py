"""One file a question. Each joins backbones, tasks, hooks and metrics and returns a record."""
