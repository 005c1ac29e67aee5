"""Any transformers causal language model seen as one ragged forward."""
