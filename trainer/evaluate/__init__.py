"""Metrics of generated images: activations, distances, references.

`judge.evaluate` goes from images to numbers; `references` makes and reads what they are compared with;
`extractors` holds the networks and `metrics` the mathematics.
"""
