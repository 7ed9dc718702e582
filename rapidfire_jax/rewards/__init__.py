"""Rewards: plain functions of prompts and responses, and their weighted sum."""
