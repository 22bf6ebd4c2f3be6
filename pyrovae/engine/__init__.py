"""The engine: a pair run with K particles, its log-weights, and the gradient that follows from them."""
