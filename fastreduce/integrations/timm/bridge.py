"""All of timm's models and blocks that are known: importing this module registers them."""

from . import eva, hosts, pairs, parts

__all__ = ["eva", "hosts", "pairs", "parts"]
