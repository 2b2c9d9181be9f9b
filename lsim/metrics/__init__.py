"""The metrics, one file a family; :mod:`lsim.registry` names them. They don't import one another."""
