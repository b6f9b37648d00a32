"""Engines behind ``fastreduce compare`` and ``fastreduce plan``: all that takes time on a clock."""
