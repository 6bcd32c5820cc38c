/* libnnturbo: segments scans with bundles that `nnturbo build --backend native` made. Needs an x86-64 CPU with AVX2 and
 * FMA, or a 64-bit ARM one. All functions may be called from several threads at once, also with one model. */

#ifndef NNTURBO_H
#define NNTURBO_H

#include <stdint.h>

#if defined(_WIN32) && defined(NNTURBO_BUILDS_SHARED)
#define NNTURBO_API __declspec(dllexport)
#elif defined(_WIN32) && defined(NNTURBO_SHARED)
#define NNTURBO_API __declspec(dllimport)
#elif defined(__GNUC__) && !defined(_WIN32)
#define NNTURBO_API __attribute__((visibility("default")))
#else
#define NNTURBO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  NNTURBO_DONE = 0,
  NNTURBO_BAD_ARGUMENT = 1,    /* the call itself: options, null pointers */
  NNTURBO_BAD_BUNDLE = 2,      /* missing, damaged, or not for this library */
  NNTURBO_BAD_SCAN = 3,        /* does not fit the model, or holds no numbers */
  NNTURBO_BAD_NETWORK = 4,     /* its outputs are no numbers */
  NNTURBO_CANCELLED = 5,       /* by `progress` */
  NNTURBO_NO_MEMORY = 6,
  NNTURBO_BAD_PROCESSOR = 7,   /* lacks instructions */
  NNTURBO_FAILED = 8           /* the system refused something else, such as threads */
} nnturbo_status;

/* Why a call failed, in one sentence; untouched where it did not. */
typedef struct { char text[1024]; } nnturbo_error;

typedef enum {
  NNTURBO_INT8, NNTURBO_UINT8, NNTURBO_INT16, NNTURBO_UINT16, NNTURBO_INT32, NNTURBO_UINT32, NNTURBO_INT64,
  NNTURBO_UINT64, NNTURBO_FLOAT32, NNTURBO_FLOAT64
} nnturbo_type;

typedef struct nnturbo_model nnturbo_model;

/* What a model takes and says; valid as long as the model. */
typedef struct {
  int64_t channels;                /* a scan must have */
  int64_t labels;                  /* or regions, without background */
  const char* const* label_names;
  int64_t classes;                 /* of a whole scan; 0 for models without classification */
  const char* const* class_names;
  const char* reader;              /* nnU-Net's class that read the training scans, such as SimpleITKIO */
  int regions;                     /* whether labels are regions, which overlap */
} nnturbo_information;

typedef struct {
  const void* voxels;              /* (channels, z, y, x), x densest: raw values as stored in the file (CT numbers) */
  nnturbo_type type;
  int64_t channels, z, y, x;
  double spacing_mm[3];            /* distance between voxels along z, y, x */
} nnturbo_scan;

typedef struct {
  double tile_step_size;           /* distance of tiles as a fraction of the patch, in (0, 1] */
  int mirror;                      /* average over mirrored views, along the axes the model was trained with */
  int threads;                     /* up to 1024; 0 for one for each core */
  int (*progress)(void* context, int64_t done, int64_t all); /* runs of the network; cancels by other than 0; or null */
  void* context;                   /* passed on to `progress`, which the calling thread runs */
} nnturbo_options;

typedef struct {
  int64_t z, y, x;                 /* as the scan's */
  nnturbo_type type;               /* of the labels: NNTURBO_UINT8, or NNTURBO_UINT16 from 255 labels on */
  const void* labels;              /* (z, y, x) */
  const double* volumes_ml;        /* of each label or region, in the order of `label_names` */
  int64_t class_label;             /* index of the most probable class; -1 for models without classification */
  const double* class_probabilities; /* of each class, adding up to 1 */
} nnturbo_prediction;

NNTURBO_API const char* nnturbo_version(void);

/* nnU-Net's: steps of half a patch, with mirroring; a thread for each core. */
NNTURBO_API nnturbo_options nnturbo_defaults(void);

/* Open a bundle, a folder, after comparing each of its files with the SHA-256 in its manifest. */
NNTURBO_API nnturbo_status nnturbo_open(const char* bundle, nnturbo_model** model, nnturbo_error* error);
NNTURBO_API void nnturbo_close(nnturbo_model* model);
NNTURBO_API const nnturbo_information* nnturbo_describe(const nnturbo_model* model);

/* Segment a scan; `options` may be null for the defaults. */
NNTURBO_API nnturbo_status nnturbo_predict(const nnturbo_model* model, const nnturbo_scan* scan,
                                           const nnturbo_options* options, nnturbo_prediction** prediction,
                                           nnturbo_error* error);
NNTURBO_API void nnturbo_free(nnturbo_prediction* prediction);

#ifdef __cplusplus
}
#endif

#endif
