"""How good a drafter is, and whether it fits its target."""
