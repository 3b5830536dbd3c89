"""Evaluation: retrieval tasks made offline, perplexity and agreement against the dense base."""
