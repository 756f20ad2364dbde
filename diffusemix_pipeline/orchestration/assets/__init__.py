"""The assets, a module each. What is shared between them is in `orchestration.metadata`."""
