#include "cpu/student_forward.h"

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace advkd {
namespace {

// From this many output pixels on, images are computed one by one.
constexpr i64 kLargeImage = 64 * 64;
// Bytes of activations that images in the low-resolution layers may take together.
constexpr i64 kGroupBytes = 4 << 20;
// Below this many multiply-adds, waking threads takes longer than the work.
constexpr i64 kSmallJob = 100'000;
constexpr i64 kPage = i64{2} << 20;

std::mutex pool_mutex;
std::vector<std::unique_ptr<Workspace>> pool;

// Regions of one workspace follow each other with a gap, so that a sanitizer can tell them apart and rows of one do not share a
// line with another.
i64 aligned(i64 bytes) {
  return round_up(bytes, 256) + 256;
}

// Under the address sanitizer the gap behind a region may not be touched until `open_gap`.
void close_gap([[maybe_unused]] char* region, [[maybe_unused]] i64 bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(region, bytes);
  __asan_poison_memory_region(region + bytes, aligned(bytes) - bytes);
#endif
}

void open_gap([[maybe_unused]] char* region, [[maybe_unused]] i64 bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(region, aligned(bytes));
#endif
}

i64 output_pixels(const ConvLayer& layer) {
  return layer.height * layer.width * layer.scale() * layer.scale();
}

i64 padded_channels(i64 channels) {
  return round_up(channels, 16);
}

// Where everything lies in the workspace. Activations alternate between two regions per half of the network.
struct Memory {
  size_t split = 0;          // the first layer that runs image by image
  i64 group = 1;             // images that go through the layers before it together
  i64 low[2] = {}, high[2] = {}, scratch = 0;  // bytes

  i64 total(i64 threads) const { return aligned(low[0]) + aligned(low[1]) + aligned(high[0]) + aligned(high[1]) + threads * scratch; }
};

i64 input_bytes(const ConvLayer& layer, i64 images) {
  return element_bytes(layer.storage) *
      Activations::elements(images, padded_channels(layer.c_in), layer.height, layer.width);
}

Memory plan_memory(const ConvKernels& kernels, const std::vector<StudentLayer>& layers, i64 images, i64 threads) {
  Memory memory;
  while (memory.split < layers.size() && output_pixels(layers[memory.split].conv) < kLargeImage) ++memory.split;
  i64 largest[2] = {};
  for (size_t i = 0; i < std::min(memory.split + 1, layers.size()); ++i)
    largest[i % 2] = std::max(largest[i % 2], input_bytes(layers[i].conv, 1));
  memory.group = std::clamp(kGroupBytes / (largest[0] + largest[1]), i64{1}, std::max(images, i64{1}));
  for (size_t i = 0; i < layers.size(); ++i) {
    // The input of the first layer of the second half is the output of the first half.
    const bool together = i <= memory.split;
    i64* region = together ? memory.low : memory.high;
    region[i % 2] = std::max(region[i % 2], input_bytes(layers[i].conv, together ? memory.group : 1));
    // The last group may be smaller and a small job runs on one thread: both are cut into other blocks.
    const i64 counts[2] = {together ? memory.group : 1, i < memory.split ? images % memory.group : 0};
    for (const i64 count : counts)
      for (const i64 workers : {i64{1}, threads})
        if (count > 0)
          memory.scratch = std::max(memory.scratch, aligned(kernels.schedule(layers[i].conv, count, workers).scratch_bytes));
  }
  return memory;
}

struct Run {
  const ConvKernels& kernels;
  const Parallel& parallel;
  i64 threads;
  char* scratch;
  i64 scratch_bytes;

  // Tasks go to whichever worker is free.
  void tasks(i64 count, i64 workers, const std::function<void(i64 task, char* scratch)>& body) const {
    workers = std::min(workers, count);
    if (workers <= 1) {
      for (i64 task = 0; task < count; ++task) body(task, scratch);
      return;
    }
    std::atomic<i64> next{0};
    parallel(workers, [&](i64 worker) {
      for (i64 task = next++; task < count; task = next++) body(task, scratch + worker * scratch_bytes);
    });
  }

  void layer(const ConvJob& job) const {
    const i64 workers = job.images * products_per_image(job.layer) < kSmallJob ? 1 : threads;
    const ConvSchedule schedule = kernels.schedule(job.layer, job.images, workers);
    const i64 halos = job.layer.algorithm == Algorithm::dot ? 0 : job.images;
    tasks(halos + schedule.tasks(), workers, [&](i64 task, char* own) {
      if (task < halos)
        kernels.clear_halo(job.out, job.layer.storage, task, job.images);
      else
        kernels.run(job, schedule, task - halos, own);
    });
  }

  void import(const float* planar, i64 stride, i64 channels, const Activations& out, Storage storage, i64 first, i64 images, bool halo) const {
    tasks(images, channels * out.height * out.width * images < kSmallJob / 8 ? 1 : threads, [&](i64 image, char*) {
      if (halo) kernels.clear_halo(out, storage, image, images);
      kernels.import_planar(planar, stride, channels, out, storage, first, image);
    });
  }
};

}  // namespace

i64 Workspace::rounded(i64 bytes) {
  return round_up(std::max(bytes, i64{1}), bytes < kPage ? 4096 : kPage);
}

Workspace::Workspace(i64 bytes) : bytes_(rounded(bytes)) {
  data_ = static_cast<char*>(std::aligned_alloc(bytes < kPage ? 4096 : kPage, bytes_));
  if (!data_) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
  // Memory that is read before it is written is a NaN, in either storage.
  std::memset(data_, 0xFF, bytes_);
#endif
#if defined(MADV_HUGEPAGE)
  // Rows of many channels lie pages apart; large pages save the look-ups.
  if (bytes >= kPage) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() {
  std::free(data_);
}

std::unique_ptr<Workspace> acquire_workspace(i64 bytes) {
  {
    const std::lock_guard lock(pool_mutex);
    const auto smaller = [](const auto& a, const auto& b) { return a->bytes() < b->bytes(); };
    std::sort(pool.begin(), pool.end(), smaller);
    for (auto it = pool.begin(); it != pool.end(); ++it)
      if ((*it)->bytes() >= bytes) {
        auto found = std::move(*it);
        pool.erase(it);
        return found;
      }
    if (!pool.empty()) pool.pop_back();
  }
  return std::make_unique<Workspace>(bytes);
}

void release_workspace(std::unique_ptr<Workspace> workspace) {
  const std::lock_guard lock(pool_mutex);
  pool.push_back(std::move(workspace));
}

i64 clear_workspaces() {
  const std::lock_guard lock(pool_mutex);
  i64 bytes = 0;
  for (const auto& workspace : pool) bytes += workspace->bytes();
  pool.clear();
  return bytes;
}

i64 student_workspace_bytes(const ConvKernels& kernels, const std::vector<StudentLayer>& layers, i64 images, i64 threads) {
  return plan_memory(kernels, layers, images, threads).total(threads);
}

void run_student(
    const ConvKernels& kernels, const std::vector<StudentLayer>& layers, const float* z, i64 images, void* out, i64 threads,
    const Parallel& parallel, char* workspace) {
  const Memory memory = plan_memory(kernels, layers, images, threads);
  char* low[2] = {workspace, workspace + aligned(memory.low[0])};
  char* high[2] = {low[1] + aligned(memory.low[1]), low[1] + aligned(memory.low[1]) + aligned(memory.high[0])};
  const Run run{kernels, parallel, threads, high[1] + aligned(memory.high[1]), memory.scratch};
  for (int i = 0; i < 2; ++i) {
    close_gap(low[i], memory.low[i]);
    close_gap(high[i], memory.high[i]);
  }

  std::vector<i64> offsets;  // of each layer's latent part in z
  i64 numel = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const ConvLayer& conv = layers[i].conv;
    const i64 channels = i == 0 ? conv.c_in : layers[i].detail;
    offsets.push_back(numel);
    numel += channels * conv.height * conv.width;
  }
  const ConvLayer& head = layers.back().conv;
  const i64 image_bytes = head.c_out * output_pixels(head) * element_bytes(head.storage);

  const auto input_of = [&](size_t i, char* const (&region)[2]) {
    const ConvLayer& conv = layers[i].conv;
    return Activations{region[i % 2], padded_channels(conv.c_in), conv.height, conv.width};
  };
  const auto run_layer = [&](size_t i, const Activations& in, i64 first, i64 count, char* const (&region)[2]) {
    ConvJob job{layers[i].conv, layers[i].packed, in, {}, static_cast<char*>(out) + first * image_bytes, count};
    if (i + 1 == layers.size()) return run.layer(job);
    job.out = input_of(i + 1, region);
    run.layer(job);
    if (const i64 detail = layers[i + 1].detail) {
      const ConvLayer& next = layers[i + 1].conv;
      run.import(z + first * numel + offsets[i + 1], numel, detail, job.out, next.storage, next.c_in - detail, count, false);
    }
  };

  for (i64 first = 0; first < images; first += memory.group) {
    const i64 count = std::min(memory.group, images - first);
    const ConvLayer& stem = layers.front().conv;
    run.import(z + first * numel, numel, stem.c_in, input_of(0, low), stem.storage, 0, count, true);
    for (size_t i = 0; i < memory.split; ++i) run_layer(i, input_of(i, low), first, count, low);
    for (i64 image = 0; image < count && memory.split < layers.size(); ++image) {
      Activations in = input_of(memory.split, low);
      in.data = static_cast<char*>(in.data) + image * in.image() * element_bytes(stem.storage);
      for (size_t i = memory.split; i < layers.size(); ++i) {
        run_layer(i, in, first + image, 1, high);
        if (i + 1 < layers.size()) in = input_of(i + 1, high);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    open_gap(low[i], memory.low[i]);
    open_gap(high[i], memory.high[i]);
  }
}

namespace {

// One layer with its own input and output in a workspace, filled by `fill(Run, in)`; `body(Run, job)` does the rest.
template <typename Fill, typename Body>
void with_layer(const ConvKernels& kernels, const ConvLayer& layer, const void* packed, i64 images, i64 threads, const Parallel& parallel, const Fill& fill, const Body& body) {
  const i64 s = layer.scale(), element = element_bytes(layer.storage);
  const i64 in_channels = padded_channels(layer.c_in), out_channels = padded_channels(layer.c_out);
  const i64 in_bytes = element * Activations::elements(images, in_channels, layer.height, layer.width);
  const i64 out_bytes = element * Activations::elements(images, out_channels, s * layer.height, s * layer.width);
  i64 scratch = 0;
  for (const i64 workers : {i64{1}, threads}) scratch = std::max(scratch, aligned(kernels.schedule(layer, images, workers).scratch_bytes));
  // Not from the pool: a batch of large images is the caller's to hold, and only as long as the call.
  const Workspace workspace(aligned(in_bytes) + aligned(out_bytes) + threads * scratch);
  char* in = workspace.data();
  char* out = in + aligned(in_bytes);
  const Run run{kernels, parallel, threads, out + aligned(out_bytes), scratch};
  const ConvJob job{layer, packed, {in, in_channels, layer.height, layer.width}, {out, out_channels, s * layer.height, s * layer.width}, nullptr, images};
  close_gap(in, in_bytes);
  close_gap(out, out_bytes);
  fill(run, job.in);
  body(run, job);
  open_gap(in, in_bytes);
  open_gap(out, out_bytes);
}

}  // namespace

void conv_block_forward(
    const ConvKernels& kernels, const ConvLayer& layer, const void* packed, const float* x, i64 images, void* out, i64 threads,
    const Parallel& parallel) {
  const auto fill = [&](const Run& run, const Activations& in) {
    run.import(x, layer.c_in * layer.height * layer.width, layer.c_in, in, layer.storage, 0, images, true);
  };
  with_layer(kernels, layer, packed, images, threads, parallel, fill, [&](const Run& run, ConvJob job) {
    job.planar = out;
    run.layer(job);
    if (layer.algorithm == Algorithm::dot) return;
    run.tasks(images, threads, [&](i64 image, char*) { kernels.export_planar(job.out, layer.storage, layer.c_out, image, out); });
  });
}

double conv_block_seconds(
    const ConvKernels& kernels, const ConvLayer& layer, const void* packed, i64 images, i64 repeats, i64 threads,
    const Parallel& parallel) {
  const i64 numel = layer.c_in * layer.height * layer.width;
  std::vector<float> x(images * numel);
  std::uint32_t state = 1;
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  }
  const i64 scale = layer.scale();
  std::vector<char> planar(layer.algorithm == Algorithm::dot ? images * layer.c_out * layer.height * layer.width * scale * scale * 4 : 0);
  double best = 1e30;
  const auto fill = [&](const Run& run, const Activations& in) { run.import(x.data(), numel, layer.c_in, in, layer.storage, 0, images, true); };
  with_layer(kernels, layer, packed, images, threads, parallel, fill, [&](const Run& run, ConvJob job) {
    job.planar = planar.data();
    for (i64 i = 0; i <= repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run.layer(job);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      // The first run is for the caches and the page table.
      if (i > 0) best = std::min(best, seconds);
    }
  });
  return best;
}

double product_rate(const ConvKernels& kernels, Storage storage, double seconds) {
  constexpr i64 kRounds = 4096;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0, products = 0;
  do {
    products += static_cast<double>(kRounds * kernels.multiply(storage, kRounds));
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  } while (elapsed < seconds);
  return products / elapsed;
}

}  // namespace advkd
