"""What everything is made of: data of clients, samplers, batches, trees, models and tasks.

Nothing in here knows flax.
"""
