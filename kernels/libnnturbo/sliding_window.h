// Covers the network's grid with tiles, and adds their mirrored, Gaussian-weighted logits row by row.
//
// Tiles run in z order. When the next row of tiles starts below a plane, that plane's logits are final, and it is passed
// on and dropped. So memory holds one row of tiles, independent of the length of the scan.

#pragma once

#include <functional>

#include "labels.h"
#include "network.h"
#include "preprocessing.h"
#include "voting.h"
#include "window.h"

namespace nnturbo {

// Called with the runs of the network that are done, and all of them; it throws to end the prediction.
using Progress = std::function<void(Size done, Size all)>;

// Run the network on all views of all tiles of a case, and pass finished planes of logits to `labels` in ascending z.
// `votes` gets class logits; null for networks without a classification head.
void predict_logits(const Case& scan, const Network& network, const Plan& plan, const Window& window, Size views,
                    LabelPlanes& labels, Votes* votes, const Progress& progress);

// Copy one tile of a volume, flipped along the axes of a view, to (C, *size); it is zero outside the volume.
void gather_tile(const Array& volume, const Triple& corner, const Triple& size, const View& view, float* to);

// `out += wz * wy * wx * unflip(logits)` at a tile's place in the sums.
void accumulate_view(const float* logits, const View& view, const std::array<const float*, 3>& weights,
                     const Triple& corner, const Triple& size, Array& sums);

// Drop the first planes of each channel, move the others up and clear the rest.
void shift_planes(Array& buffer, Size planes);

}  // namespace nnturbo
