"""Pyro programs as static graphs: captured, compared with the eager ones, compiled, recorded."""
