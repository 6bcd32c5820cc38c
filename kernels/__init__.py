"""Array operations of the path from scan to labels, without any knowledge of nnU-Net.

`nnturbo.kernels.reference` holds a plain torch version of each, which runs on every device.
"""

from .operators import AxisOperator
from .reference import accumulate_views, argmax_labels, gather_views, region_labels, resample_axis

__all__ = [
    "AxisOperator",
    "accumulate_views",
    "argmax_labels",
    "gather_views",
    "region_labels",
    "resample_axis",
]
