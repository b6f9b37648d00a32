"""Reduce the tokens of Hugging Face's encoders. Classes are known by their names: nothing here imports transformers."""
