"""The agent: the product's only process on a node.

Only the standard library and small packages are imported here: this is on the path to the first step.
"""
