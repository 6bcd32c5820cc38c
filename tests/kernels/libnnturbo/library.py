"""libnnturbo as any program that has only its header calls it."""

import ctypes

import numpy as np

from tests.kernels.libnnturbo.stages import Scan

PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
DONE, BAD_ARGUMENT, BAD_BUNDLE, BAD_SCAN, BAD_NETWORK, CANCELLED, NO_MEMORY = range(7)
UINT16 = 3


class Information(ctypes.Structure):
    """`nnturbo_information`."""

    _fields_ = (
        ("channels", ctypes.c_int64),
        ("labels", ctypes.c_int64),
        ("label_names", ctypes.POINTER(ctypes.c_char_p)),
        ("classes", ctypes.c_int64),
        ("class_names", ctypes.POINTER(ctypes.c_char_p)),
        ("reader", ctypes.c_char_p),
        ("regions", ctypes.c_int),
    )


class Options(ctypes.Structure):
    """`nnturbo_options`."""

    _fields_ = (
        ("tile_step_size", ctypes.c_double),
        ("mirror", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("progress", PROGRESS),
        ("context", ctypes.c_void_p),
    )


class Prediction(ctypes.Structure):
    """`nnturbo_prediction`."""

    _fields_ = (
        ("shape", ctypes.c_int64 * 3),
        ("type", ctypes.c_int),
        ("labels", ctypes.c_void_p),
        ("volumes_ml", ctypes.POINTER(ctypes.c_double)),
        ("class_label", ctypes.c_int64),
        ("class_probabilities", ctypes.POINTER(ctypes.c_double)),
    )


class LibraryError(Exception):
    """What the library says, and its status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Model:
    """An open bundle."""

    def __init__(self, path, bundle):
        self.library = ctypes.CDLL(str(path))
        self.library.nnturbo_describe.restype = ctypes.POINTER(Information)
        self.library.nnturbo_defaults.restype = Options
        self._model = ctypes.c_void_p()
        self._call("open", str(bundle).encode(), ctypes.byref(self._model))
        about = self.library.nnturbo_describe(self._model).contents
        self.channels, self.reader, self.regions = about.channels, about.reader.decode(), bool(about.regions)
        self.label_names = [about.label_names[i].decode() for i in range(about.labels)]
        self.class_names = [about.class_names[i].decode() for i in range(about.classes)]

    def _call(self, name, *arguments):
        error = ctypes.create_string_buffer(1024)
        status = getattr(self.library, f"nnturbo_{name}")(*arguments, error)
        if status:
            assert "\n" not in error.value.decode()
            raise LibraryError(status, error.value.decode())

    def predict(self, array, spacing, **changes):
        """Give labels, volumes by name and class probabilities; `changes` are of the options."""
        options = self.library.nnturbo_defaults()
        progress = PROGRESS(changes.pop("progress", lambda context, done, of: 0))
        options.progress = progress
        for name, value in changes.items():
            setattr(options, name, value)
        scan, found = Scan.of(array, spacing), ctypes.POINTER(Prediction)()
        self._call("predict", self._model, ctypes.byref(scan), ctypes.byref(options), ctypes.byref(found))
        got = found.contents
        assert tuple(got.shape) == array.shape[1:]
        dtype = np.uint16 if got.type == UINT16 else np.uint8
        stored = (ctypes.c_char * (int(np.prod(got.shape)) * np.dtype(dtype).itemsize)).from_address(got.labels)
        labels = np.frombuffer(stored, dtype).reshape(got.shape).copy()
        volumes = {name: got.volumes_ml[i] for i, name in enumerate(self.label_names)}
        probabilities = [got.class_probabilities[i] for i in range(len(self.class_names))]
        assert got.class_label == (int(np.argmax(probabilities)) if probabilities else -1)
        self.library.nnturbo_free(found)
        return labels, volumes, probabilities

    def close(self):
        self.library.nnturbo_close(self._model)
