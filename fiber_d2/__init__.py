"""FIBER's fine-grained stage as a Detectron2 extension; importing it fills the registries."""

import warnings

with warnings.catch_warnings():
    # fvcore and Detectron2 compile functions with it when they are first imported, which is here.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    from . import config, data, modeling  # noqa: F401

from .version import __version__ as __version__
