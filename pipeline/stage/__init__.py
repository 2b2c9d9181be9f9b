"""Run blocks on workers: what every stage that computes has in common."""
