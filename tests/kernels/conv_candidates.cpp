// Parts of the plan of conv_block's tiles, for tests of every candidate.

#include "cuda/host/conv_block.cpp"

namespace advkd::host {

extern "C" int shape_of(int index, int* rows, int* columns, int* blocks) {
  if (index >= kConvShapeCount) return 0;
  *rows = kConvShapes[index].rows;
  *columns = kConvShapes[index].columns;
  *blocks = kConvShapes[index].blocks;
  return 1;
}

extern "C" int suits(int units, int shape, int channel_warps, int parts) {
  ConvBlockParameters p{};
  p.columns = units;
  p.activation = 1;
  return conv_suits(p, kConvShapes[shape], conv_best_columns(units), channel_warps, parts);
}

// Plans a candidate in the parameters of another plan of the layer. Whether it fits.
extern "C" int plan_candidate(ConvBlockParameters* p, const ConvDevice* device, const int* candidate) {
  return conv_layer_try(*p, *device, candidate[0], candidate[1], candidate[2], candidate[3]) >= 0;
}

}  // namespace advkd::host
