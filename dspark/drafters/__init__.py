"""Who proposes: one protocol, one backbone, every checkpoint layout."""
