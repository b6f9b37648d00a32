"""Every primitive of ``bench.primitives``, timed: ``python -m pytest bench/micro -k select_topk``."""


def test_primitive(speed): ...
