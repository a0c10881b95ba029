"""The mathematics: one transformer, one cache, one rollout, and the objectives. No Ray, no files."""
