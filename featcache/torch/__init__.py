"""Caches in a training loop of PyTorch.

`Loader` is the one to take: it shuffles globally, resumes anywhere, knows of ranks and decodes on the GPU. `Dataset` is
for what wants a map-style dataset: `torch.utils.data.DataLoader`, Lightning, accelerate.
"""

from featcache.torch.dataset import Dataset
from featcache.torch.loader import Loader

__all__ = ["Dataset", "Loader"]
