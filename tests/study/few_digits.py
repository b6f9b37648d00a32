"""A server of worker processes in which every study has a few digits as its data; see ``test_train_all``."""

from fastreduce.study import data

from .test_train import few_digits

data.open_data = lambda *arguments, **named: few_digits(16)
