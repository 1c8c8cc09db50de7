"""What everything is made of: data of clients, samplers, batches, trees, models, tasks. Nothing in here knows flax."""
