"""Ragged rows over cached keys and values, for targets and drafters alike."""
