"""What takes time on a clock: the engines behind ``fastreduce compare`` and ``fastreduce plan``."""
