"""The tests. A package of their own, so that no other of this name can be imported in its place."""
