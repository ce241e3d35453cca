"""Decisions as pure values with reasons; no side effects."""
