"""The model for other programs: ``torch.export`` and ONNX files, and what asks them questions.

:func:`export` writes a folder; :class:`ExportedPredictor` asks it as a
:class:`~fiber_d2.predictor.Predictor` is asked. :mod:`fiber_d2.export.parts` says what is in it.
"""

from .detections import detections
from .programs import load_program
from .runner import ExportedModel, ExportedPredictor
from .write import export

__all__ = ["ExportedModel", "ExportedPredictor", "detections", "export", "load_program"]
