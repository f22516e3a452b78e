"""Before 0.5.13: a rotary embedding kernel that is imported for any device the engine does not know."""
