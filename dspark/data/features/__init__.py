"""The target's features on disk: what training needs of them, small, checked and resumable."""
