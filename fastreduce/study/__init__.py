"""The study of the paper: train, record, compare, correlate and draw; needs ``fastreduce[study]``."""
