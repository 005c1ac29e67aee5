"""Learning while serving: a drafter and its calibration follow the traffic (docs/learning.md).

The collector gathers features and outcomes of consenting requests in the engine's thread; the
learner writes them to a bounded directory, keeps a trainer process and swaps in what that brings;
the trainer refreshes the calibration and trains the drafter. Called by the service and the command.
"""
