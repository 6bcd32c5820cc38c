/* Segments a made-up scan with a bundle, and prints the volume of each label. */

#include <inttypes.h>
#include <nnturbo.h>
#include <stdio.h>
#include <stdlib.h>

static int show_progress(void* context, int64_t done, int64_t all) {
  (void)context;
  fprintf(stderr, "\r%" PRId64 " of %" PRId64, done, all);
  return 0; /* other than 0 would cancel */
}

int main(int count, char** arguments) {
  nnturbo_error error;
  nnturbo_model* model = NULL;
  if (count != 2 || nnturbo_open(arguments[1], &model, &error) != NNTURBO_DONE) {
    fprintf(stderr, "%s\n", count == 2 ? error.text : "usage: segment_c BUNDLE");
    return 2;
  }
  const nnturbo_information* about = nnturbo_describe(model);
  const int64_t z = 32, y = 96, x = 96;
  int16_t* voxels = malloc((size_t)(about->channels * z * y * x) * sizeof *voxels);
  for (int64_t i = 0; i < about->channels * z * y * x; ++i) voxels[i] = (int16_t)(i % x * 3 - 100); /* CT numbers */

  const nnturbo_scan scan = {voxels, NNTURBO_INT16, about->channels, z, y, x, {2.5, 0.8, 0.8}};
  nnturbo_options options = nnturbo_defaults();
  options.progress = show_progress;
  nnturbo_prediction* prediction = NULL;
  const nnturbo_status status = nnturbo_predict(model, &scan, &options, &prediction, &error);
  if (status == NNTURBO_DONE) {
    printf("labels of %" PRId64 " x %" PRId64 " x %" PRId64 "\n", prediction->z, prediction->y, prediction->x);
    for (int64_t i = 0; i < about->labels; ++i) printf("%s: %.2f ml\n", about->label_names[i], prediction->volumes_ml[i]);
    if (prediction->class_label >= 0) printf("class %s\n", about->class_names[prediction->class_label]);
    nnturbo_free(prediction);
  } else {
    fprintf(stderr, "%s\n", error.text);
  }
  free(voxels);
  nnturbo_close(model);
  return status == NNTURBO_DONE ? 0 : 1;
}
