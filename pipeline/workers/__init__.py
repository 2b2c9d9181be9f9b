"""How stages get at workers: profiles, clusters made from them, metrics that stay there, tasks for them."""
