from .feed import as_dataset, batches
from .images import Images, check_support
from .names import DATASETS
from .sets import DataError, Splits, load

__all__ = ["DATASETS", "DataError", "Images", "Splits", "as_dataset", "batches", "check_support", "load"]
