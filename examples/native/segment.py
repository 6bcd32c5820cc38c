"""Segments a made-up scan with the C library alone: python segment.py libnnturbo.so BUNDLE."""

import ctypes as c
import sys

library, error, model, answer = c.CDLL(sys.argv[1]), c.create_string_buffer(1024), c.c_void_p(), c.c_void_p()
fields = {"voxels": c.c_void_p, "type": c.c_int, "shape": c.c_int64 * 4, "spacing_mm": c.c_double * 3}
Scan = type("Scan", (c.Structure,), {"_fields_": list(fields.items())})
voxels = (c.c_int16 * (32 * 96 * 96))(*(i % 96 * 3 - 100 for i in range(32 * 96 * 96)))  # CT numbers, (z, y, x)
scan = Scan(c.addressof(voxels), 2, (1, 32, 96, 96), (2.5, 0.8, 0.8))  # 2 is NNTURBO_INT16
failed = library.nnturbo_open(sys.argv[2].encode(), c.byref(model), error)
if failed or library.nnturbo_predict(model, c.byref(scan), None, c.byref(answer), error):
    sys.exit(error.value.decode())
labels = c.string_at(c.cast(answer, c.POINTER(c.c_void_p))[4], len(voxels))  # the fifth field of nnturbo_prediction
print({label: labels.count(label) for label in sorted(set(labels))})  # noqa: T201
