#include "prediction.h"

#include "error.h"

namespace nnturbo {

Prediction predict(const nnturbo_scan& scan, const Plan& plan, const Network& network, const Options& options,
                   const Progress& progress) {
  if (!(0 < options.tile_step_size && options.tile_step_size <= 1))
    throw Error(NNTURBO_BAD_ARGUMENT,
                "tile_step_size must be in (0, 1], got " + std::to_string(options.tile_step_size));
  const Size views = options.mirror ? static_cast<Size>(plan.views.size()) : 1;
  const Case prepared = preprocess(scan, plan);
  const Window window(plan, prepared.shape(), options.tile_step_size, views);
  LabelPlanes labels(prepared, plan);
  std::optional<Votes> votes;
  if (plan.classification) votes.emplace(*plan.classification, plan.labels.regions_class_order.has_value(), views);
  predict_logits(prepared, network, plan, window, views, labels, votes ? &*votes : nullptr, progress);

  Prediction prediction;
  prediction.labels = labels.take();
  prediction.volumes_ml =
      volumes_ml(prediction.labels, plan.labels, {scan.spacing_mm[0], scan.spacing_mm[1], scan.spacing_mm[2]});
  if (votes) prediction.class_probabilities = votes->probabilities();
  return prediction;
}

}  // namespace nnturbo
