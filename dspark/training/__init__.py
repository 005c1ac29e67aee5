"""Objectives, anchors, losses, the loop and its checkpoints."""
