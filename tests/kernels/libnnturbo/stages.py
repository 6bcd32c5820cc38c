"""The stages of libnnturbo, called through ctypes."""

import ctypes
import json
from dataclasses import asdict

import numpy as np
from nnturbo.engine.export.native_path import describe_path
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json

TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
"""numpy's names of `nnturbo_type`, in its order."""

CANCELLED = 5
NETWORK = ctypes.CFUNCTYPE(None, *[ctypes.POINTER(ctypes.c_float)] * 3)


class Scan(ctypes.Structure):
    """`nnturbo_scan`."""

    _fields_ = (
        ("voxels", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("channels", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 3),
        ("spacing", ctypes.c_double * 3),
    )

    @classmethod
    def of(cls, array, spacing):
        """Describe (C, Z, Y, X), which must outlive the description."""
        assert array.flags.c_contiguous
        return cls(array.ctypes.data, TYPES.index(array.dtype.name), len(array), array.shape[1:], tuple(spacing))


class StageError(Exception):
    """What a stage says, and its status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def plan_text(plan, mirror_axes=()):
    """Content of path.json."""
    return json.dumps(asdict(describe_path(plan, mirror_axes)))


def text_of(plans, dataset=None, mirror_axes=()):
    return plan_text(parse_plan(plans, dataset or dataset_json(), "3d_fullres"), mirror_axes)


class Stages:
    """Functions of stages.cpp with numpy arrays."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))

    def _call(self, name, *arguments):
        text = ctypes.create_string_buffer(1024)
        status = getattr(self._library, f"stage_{name}")(*map(_plain, arguments), text)
        if status:
            raise StageError(status, text.value.decode())

    def operator(self, n_in, n_out, order, mode=""):
        matrix = np.zeros((n_out, n_in), np.float32)
        self._call("operator", n_in, n_out, order, mode, matrix)
        return matrix

    def resample(self, plan, data, new_shape, old_spacing, new_spacing, rows=None, *, logits=False):
        start, stop = rows or (0, new_shape[0])
        out = np.empty((len(data), stop - start, *new_shape[1:]), np.float32)
        shapes = (_sizes(data.shape[1:]), _sizes(new_shape), _steps(old_spacing), _steps(new_spacing))
        self._call("resample", plan, int(logits), data, len(data), *shapes, start, stop, out)
        return out

    def preprocess(self, plan, array, spacing):
        scan, shape, box = Scan.of(array, spacing), np.zeros(3, np.int64), np.zeros((3, 2), np.int64)
        numbers = np.zeros((len(array), 4), np.float32)
        self._call("preprocess", plan, ctypes.byref(scan), shape, box, numbers, None)
        planes = np.empty((len(array), *shape), np.float32)
        self._call("preprocess", plan, ctypes.byref(scan), shape, box, numbers, planes)
        return box.tolist(), numbers, planes

    def filled_mask(self, array):
        mask = np.empty(array.shape[1:], np.uint8)
        scan = Scan.of(array, (1, 1, 1))
        self._call("filled_mask", ctypes.byref(scan), mask)
        return mask.astype(bool)

    def tile_positions(self, length, patch, step):
        count = np.array([100_000])
        positions = np.empty(count[0], np.int64)
        self._call("tile_positions", length, patch, float(step), positions, count)
        return positions[: count[0]].tolist()

    def axis_weights(self, length, patch, positions):
        weights = np.empty((len(positions), patch), np.float32)
        self._call("axis_weights", length, patch, _sizes(positions), len(positions), weights)
        return weights

    def gather_and_add(self, volume, corner, size, flips, weights, place, sums):
        tile = np.full((len(volume), *size), np.nan, np.float32)
        sums = sums.copy()
        chosen = np.array([axis in flips for axis in range(3)], np.int32)
        shapes = (_sizes(volume.shape[1:]), _sizes(corner), _sizes(size), chosen, np.concatenate(weights))
        self._call("gather_and_add", volume, len(volume), *shapes, _sizes(place), _sizes(sums.shape[1:]), tile, sums)
        return tile, sums

    def mean_focus(self, logits, channels, *, regions):
        mean = np.zeros(1, np.float32)
        shape = _sizes(logits.shape[1:])
        self._call("mean_focus", logits, len(logits), shape, _sizes(channels), len(channels), int(regions), mean)
        return float(mean[0])

    def predict(self, plan, array, spacing, network, *, step=0.5, mirror=True, cancel_after=-1):
        """Run the whole path; `network` takes a tile (C, *patch) and gives logits (K, *patch) and class logits (S)."""
        described, failures = json.loads(plan), []
        patch = (1, *described["patch_size"])[-3:]
        classes = described["classification"]

        @NETWORK
        def run(tile, seg_logits, class_logits):
            try:
                given = np.ctypeslib.as_array(tile, (len(array), *patch))
                seg, of_case = network(given)
                np.ctypeslib.as_array(seg_logits, seg.shape)[:] = seg
                if classes:
                    np.ctypeslib.as_array(class_logits, of_case.shape)[:] = of_case
            except BaseException as error:  # an exception cannot pass through C
                failures.append(error)

        labels = np.empty(array.shape[1:], f"u{described['labels']['bits'] // 8}")
        volumes = np.empty(len(described["labels"]["names"]))
        probabilities = np.empty(len(classes["class_names"]) if classes else 0)
        scan, runs = Scan.of(array, spacing), np.array([cancel_after])
        try:
            self._call(
                "predict", plan, ctypes.byref(scan), float(step), int(mirror), run, runs, labels, volumes, probabilities
            )
        finally:
            if failures:
                raise failures[0]
        return labels, volumes, probabilities


def _sizes(values):
    return np.array(values, np.int64)


def _steps(values):
    return np.array(values, np.float64)


def _plain(argument):
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return argument.ctypes.data_as(ctypes.c_void_p)
    if isinstance(argument, str):
        return argument.encode()
    if isinstance(argument, bool | int):
        return ctypes.c_int64(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else argument
