"""Metrics of generated images: activations, distances, references.

`judge.evaluate` goes from images to numbers; `references` makes and reads what they are compared with;
`extractors` holds the networks, `metrics` the mathematics, `table` the names of all metrics and what each needs.
"""
