// The functions that programs call.

#include "include/nnturbo.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "../cpu/program.h"
#include "bundle.h"
#include "error.h"
#include "prediction.h"

struct nnturbo_model {
  nnturbo::Bundle bundle;
  std::vector<const char*> label_names, class_names;
  nnturbo_information information{};
};

namespace {

using nnturbo::Error;
using nnturbo::Size;

constexpr int MOST_THREADS = 1024;

// What a prediction points to.
struct Kept : nnturbo_prediction {
  nnturbo::Prediction content;
};

// What fits of a text, in one line whatever a bundle's texts hold.
void write_line(const char* text, nnturbo_error& error) {
  std::size_t length = 0;
  for (; text[length] && length < sizeof error.text - 1; ++length) {
    const bool is_control = static_cast<unsigned char>(text[length]) < ' ' || text[length] == 0x7f;
    error.text[length] = is_control ? ' ' : text[length];
  }
  error.text[length] = 0;
}

// Exceptions end here.
template <class Work>
nnturbo_status guarded(nnturbo_error* error, const Work& work) {
  auto say = [&](const char* text, nnturbo_status status) {
    if (error) write_line(text, *error);
    return status;
  };
  try {
    work();
    return NNTURBO_DONE;
  } catch (const Error& failure) {
    return say(failure.what(), failure.status);
  } catch (const std::bad_alloc&) {
    return say("there must be more memory for this scan and model than this machine has: check the scan's size",
               NNTURBO_NO_MEMORY);
  } catch (const std::exception& failure) {
    return say(failure.what(), NNTURBO_FAILED);
  }
}

int thread_count(int asked) {
  if (asked < 0 || asked > MOST_THREADS)
    throw Error(NNTURBO_BAD_ARGUMENT, "threads must be 0, for one for each core, to " + std::to_string(MOST_THREADS) +
                                          ", got " + std::to_string(asked));
  const unsigned cores = std::thread::hardware_concurrency();  // 0 where the system does not tell
  return asked ? asked : std::clamp(static_cast<int>(cores), 1, MOST_THREADS);
}

void require_pointers(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (!pointer) throw Error(NNTURBO_BAD_ARGUMENT, "all pointers but options and error must be given, one is null");
}

std::vector<const char*> pointers_to(const std::vector<std::string>& texts) {
  std::vector<const char*> pointers;
  for (const std::string& text : texts) pointers.push_back(text.c_str());
  return pointers;
}

void describe(nnturbo_model& model) {
  const nnturbo::Plan& plan = model.bundle.plan;
  model.label_names = pointers_to(plan.labels.names);
  if (plan.classification) model.class_names = pointers_to(plan.classification->class_names);
  model.information = {static_cast<Size>(plan.channels.size()),
                       static_cast<Size>(model.label_names.size()),
                       model.label_names.data(),
                       static_cast<Size>(model.class_names.size()),
                       model.class_names.data(),
                       plan.reader.c_str(),
                       plan.labels.regions_class_order.has_value()};
}

void show(const nnturbo_scan& scan, const nnturbo::Plan& plan, Kept& kept) {
  const auto& probabilities = kept.content.class_probabilities;
  const auto greatest = std::max_element(probabilities.begin(), probabilities.end());
  static_cast<nnturbo_prediction&>(kept) = {
      scan.z,
      scan.y,
      scan.x,
      plan.labels.type,
      kept.content.labels.data(),
      kept.content.volumes_ml.data(),
      probabilities.empty() ? -1 : static_cast<Size>(greatest - probabilities.begin()),
      probabilities.data()};
}

}  // namespace

const char* nnturbo_version(void) { return NNTURBO_VERSION; }

nnturbo_options nnturbo_defaults(void) { return {0.5, 1, 0, nullptr, nullptr}; }

nnturbo_status nnturbo_open(const char* bundle, nnturbo_model** model, nnturbo_error* error) {
  return guarded(error, [&] {
    require_pointers({bundle, model});
    if (!nnturbo_variant())
      throw Error(NNTURBO_BAD_PROCESSOR, "the processor must have AVX2 and FMA, this one is older: use another machine");
    const nnturbo::Threads threads(thread_count(0));
    auto made = std::make_unique<nnturbo_model>();
    made->bundle = nnturbo::open_bundle(bundle);
    describe(*made);
    *model = made.release();
  });
}

void nnturbo_close(nnturbo_model* model) { delete model; }

const nnturbo_information* nnturbo_describe(const nnturbo_model* model) { return &model->information; }

nnturbo_status nnturbo_predict(const nnturbo_model* model, const nnturbo_scan* scan, const nnturbo_options* options,
                               nnturbo_prediction** prediction, nnturbo_error* error) {
  return guarded(error, [&] {
    require_pointers({model, scan, prediction});
    const nnturbo_options chosen = options ? *options : nnturbo_defaults();
    const nnturbo::Threads threads(thread_count(chosen.threads));
    const nnturbo::Progress progress = [&](Size done, Size all) {
      if (chosen.progress && chosen.progress(chosen.context, done, all))
        throw Error(NNTURBO_CANCELLED, "the prediction was cancelled");
    };
    auto kept = std::make_unique<Kept>();
    const nnturbo::Bundle& bundle = model->bundle;
    kept->content = nnturbo::predict(*scan, bundle.plan, *bundle.network,
                                     {chosen.tile_step_size, chosen.mirror != 0}, progress);
    show(*scan, bundle.plan, *kept);
    *prediction = kept.release();
  });
}

void nnturbo_free(nnturbo_prediction* prediction) { delete static_cast<Kept*>(prediction); }
