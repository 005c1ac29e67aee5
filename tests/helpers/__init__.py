"""What the tests of several rooms build: tiny random targets, what they lend, drafters, samples."""
