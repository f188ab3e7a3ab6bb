"""What is trained on: pictures with captions from folders, tars and datasets, in batches of one shape each."""

from .dataset_report import DatasetReport
from .encoders import Encoders
from .entries import Problem
from .pictures import PictureError
from .training_data import TrainingData

__all__ = ["DatasetReport", "Encoders", "PictureError", "Problem", "TrainingData"]
