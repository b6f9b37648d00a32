"""The version, alone: whoever needs it need not import the package."""

__version__ = "0.1.0"
