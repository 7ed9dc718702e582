"""Flax decoder, heads, adapters; Hugging Face and GGUF weights and tokenizers in and out."""
