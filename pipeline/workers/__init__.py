"""Workers for the stages: cluster profiles, clusters made from them, tasks, and metrics held by workers."""
