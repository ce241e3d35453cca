"""Decisions as pure values: questions with reasons, no effects."""
