/* Runs a network on CPUs: a list of operations over numbered buffers, with the weights packed once.
 *
 * A program is data. Whoever makes it decides what is computed where: which values share a buffer, and so which
 * operation writes over its input. Here it is checked, packed and run. Values are maps, (z, y, x, channel) in memory,
 * with channels filled up with zeros to whole vectors; value 0 is a tile. A 2D network has one plane.
 *
 * In a bundle of the native backend, beside engine.json:
 *
 *   network.json          the program: an object with
 *     "format"            1
 *     "values"            [{"buffer": 0, "channels": 1, "size": [z, y, x]}, ...], as nnturbo_value
 *     "operations"        [{"kind": "convolution", "name": "encoder.stages.0.0.convs.0", "inputs": [0], "output": 1,
 *                         "taps": [1, 3, 3], "stride": [1, 1, 1], "transformed": false, "in_int16": false,
 *                         "weight": NAME, "bias": NAME, "norm": null or {"scale": NAME, "shift": NAME, "epsilon": 1e-5, "slope": 0.01,
 *                         "residual": null or value},
 *                         "upsampling": null or {"stride": [1, 2, 2], "weight": NAME, "bias": NAME}}, ...];
 *                         kinds "transposed_convolution" and "projection" have weight and bias, "concatenation" and
 *                         "average_pooling" none; taps and stride are there where the kind has them
 *     "logits"            the value of the logits
 *     "head"              null, or {"kind": "pooled" | "attention" | "focus_pooling", "features": [value, ...],
 *                         "focus_channels": [...], "regions": false, "tensors": [NAME, ...]}, as nnturbo_head
 *     "features"          values that are given out for a head that only Python runs (then "head" is null)
 *     "folds"             names of the folds; their outputs are averaged
 *   weights.safetensors   float32 tensors in the layouts of torch; a NAME is that of FOLD/NAME there
 */

#ifndef NNTURBO_PROGRAM_H
#define NNTURBO_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define NNTURBO_EXPORTED __declspec(dllexport)
#else
#define NNTURBO_EXPORTED __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Numbers that are read while a program is made, and not kept; none where the count is 0. */
typedef struct nnturbo_tensor {
  const float* data;
  int64_t count;
} nnturbo_tensor;

/* A map. Its memory is as large as the largest value of its buffer; logits are in none, which is -1. */
typedef struct nnturbo_value {
  int64_t buffer, channels, size[3];
} nnturbo_value;

enum {
  NNTURBO_CONVOLUTION = 0,            /* weight (out, in, taps); zeros around; then maybe norm and activation */
  NNTURBO_TRANSPOSED_CONVOLUTION = 1, /* weight (in, out, stride): each voxel becomes as many as the stride has */
  NNTURBO_CONCATENATION = 2,          /* of two values, by channels */
  NNTURBO_AVERAGE_POOLING = 3,        /* over blocks of the stride */
  NNTURBO_PROJECTION = 4              /* weight (out, in): the logits */
};

typedef struct nnturbo_operation {
  int64_t kind;
  int64_t inputs[2]; /* values; -1 for no second one. A convolution of two takes them as if they were concatenated */
  int64_t output;    /* value; in the buffer of the last input only for transformed convolutions, but not along z alone */
  int64_t taps[3], stride[3];
  int64_t transformed;           /* by fewer products, and not from value 0: of 1 or 3 x 3 x 3 taps with stride 1; or along z
                                    alone, in float32 and of one input, of 3 taps with stride 1 there */
  int64_t in_int16;              /* products, of a convolution, transposed or not, but not from value 0; see products.h */
  int64_t upsampling[3];         /* of the first input, by a transposed convolution, where not along z alone; else zeros */
  int64_t residual;              /* value that is added after the norm; -1 for none */
  float epsilon, slope;          /* of the norm, and what negative values are multiplied by after it */
  nnturbo_tensor weight, bias;   /* a bias may have none */
  nnturbo_tensor scale, shift;   /* of the norm, by channel; none without a norm */
  nnturbo_tensor upsampling_weight, upsampling_bias;
} nnturbo_operation;

enum {
  NNTURBO_NO_HEAD = 0,
  NNTURBO_POOLED_HEAD = 1,       /* LayerNorm (weight, bias), Linear (weight, bias), maybe GELU and another Linear */
  NNTURBO_ATTENTION_HEAD = 2,    /* for each feature key weight and bias, value weight and bias, queries, guidance; then
                                    LayerNorm and Linear */
  NNTURBO_FOCUS_POOLING_HEAD = 3 /* weight, bias */
};

/* A classification head on features, see engine/model/heads.py. */
typedef struct nnturbo_head {
  int64_t kind;
  const int64_t* features; /* values */
  int64_t feature_count;
  const int64_t* focus_channels; /* of the logits */
  int64_t focus_count, regions;  /* whether these are regions */
  const nnturbo_tensor* tensors;
  int64_t tensor_count;
  int64_t classes;
} nnturbo_head;

typedef struct nnturbo_description {
  const nnturbo_value* values;
  int64_t value_count;
  const nnturbo_operation* operations;
  int64_t operation_count;
  int64_t logits;
  nnturbo_head head;
  const int64_t* features; /* values that are given out */
  int64_t feature_count;
} nnturbo_description;

typedef struct nnturbo_program nnturbo_program;

/* What a program takes and gives. */
typedef struct nnturbo_shapes {
  int64_t channels, size[3]; /* of a tile */
  int64_t outputs, classes;  /* of the logits and of the class logits; 0 classes without a head */
  int64_t weight_bytes, buffer_bytes; /* that it keeps, and that it needs while it runs one tile */
} nnturbo_shapes;

/* The name of the instructions that are used, the widest that this processor has; null where it has too few, and can
 * run no program. */
NNTURBO_EXPORTED const char* nnturbo_variant(void);

/* Whether these and this processor can multiply in int16: 1 or 0. */
NNTURBO_EXPORTED int nnturbo_multiplies_int16(void);

/* Use those of another name for programs that are made from now on. 1 where they are not here, else 0. */
NNTURBO_EXPORTED int nnturbo_use(const char* name);

/* Check a program and pack its weights for this processor, with so many threads. What is described may go afterwards.
 * Null where it cannot be run or memory is short; the reason is written to `error`. */
NNTURBO_EXPORTED nnturbo_program* nnturbo_program_create(const nnturbo_description* description, int threads,
                                                         char* error, size_t error_size);

NNTURBO_EXPORTED void nnturbo_program_destroy(nnturbo_program* program);

NNTURBO_EXPORTED void nnturbo_program_shapes(const nnturbo_program* program, nnturbo_shapes* shapes);

/* Run tiles, (tiles, channels, z, y, x). Several threads may do so at once, each with threads and buffers of its own.
 * `logits` become (tiles, outputs, z, y, x), `class_logits` (tiles, classes), each of `features` (tiles, z, y, x,
 * channels); the last two may be null. 1 where memory is short, else 0. */
NNTURBO_EXPORTED int nnturbo_program_run(const nnturbo_program* program, int64_t tiles, const float* input,
                                         float* logits, float* class_logits, float* const* features, int threads);

/* Run one tile, and write to `seconds` how long each operation took, two numbers each: the second is that of its norm. */
NNTURBO_EXPORTED int nnturbo_program_measure(const nnturbo_program* program, const float* input, float* logits,
                                             double* seconds, int threads);

#ifdef __cplusplus
}
#endif

#endif
