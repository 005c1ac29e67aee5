"""Prompts, chat templates and loss masks, corpora, regeneration."""
