"""Model-free mode: the walk over a checkpoint tensor by tensor, without its model class."""
