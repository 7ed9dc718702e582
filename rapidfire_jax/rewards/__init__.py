"""Rewards: functions of prompts and responses, neural reward models, HTTP servers, and their weighted sum."""
