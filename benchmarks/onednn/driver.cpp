// Times oneDNN's own batch normalization, as a peer. A case comes as a line on stdin, "n c h w layout relu", layout being
// nhwc or blocked (nChw16c); it answers "ready". "time k" then runs k steps and answers with the seconds of one.
//
// A step is what a training step of a layer is: forward with the batch's statistics, then backward, float32, outputs
// allocated anew (through malloc, so that its settings matter here as they do to torch) and freed.

#include <dnnl.hpp>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

using namespace dnnl;

namespace {

struct Freed {
  void* data;
  explicit Freed(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Freed() { std::free(data); }
  Freed(const Freed&) = delete;
};

struct Case {
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};
  memory::desc data, channel;
  batch_normalization_forward::primitive_desc forward_desc;
  batch_normalization_backward::primitive_desc backward_desc;
  batch_normalization_forward forward;
  batch_normalization_backward backward;
  memory x, dy, mean, var, gamma, beta, dgamma, dbeta;

  Case(memory::dims shape, const std::string& layout, bool relu) {
    const auto tag = layout == "nhwc" ? memory::format_tag::nhwc : memory::format_tag::nChw16c;
    auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
    if (relu) flags = flags | normalization_flags::fuse_norm_relu;
    data = memory::desc(shape, memory::data_type::f32, tag);
    channel = memory::desc({shape[1]}, memory::data_type::f32, memory::format_tag::a);
#if DNNL_VERSION_MAJOR >= 3
    forward_desc = {cpu, prop_kind::forward_training, data, data, 1e-5f, flags};
    backward_desc = {cpu, prop_kind::backward, data, data, data, 1e-5f, flags, forward_desc};
#else
    forward_desc = {{prop_kind::forward_training, data, 1e-5f, flags}, cpu};
    backward_desc = {{prop_kind::backward, data, data, 1e-5f, flags}, cpu, forward_desc};
#endif
    forward = batch_normalization_forward(forward_desc);
    backward = batch_normalization_backward(backward_desc);
    x = filled(data), dy = filled(data), gamma = filled(channel), beta = filled(channel);
    mean = memory(channel, cpu), var = memory(channel, cpu), dgamma = memory(channel, cpu), dbeta = memory(channel, cpu);
  }

  memory filled(const memory::desc& desc) {
    memory m(desc, cpu);
    auto* values = static_cast<float*>(m.get_data_handle());
    uint32_t state = 12345;
    for (size_t i = 0; i < desc.get_size() / 4; ++i) {
      state = state * 1664525u + 1013904223u;
      values[i] = static_cast<float>(state >> 8) / (1 << 23) - 1;
    }
    return m;
  }

  void step() {
    const memory::desc saved = forward_desc.workspace_desc();
    const Freed y_bytes(data.get_size()), ws_bytes(saved.get_size() + 64);
    memory y(data, cpu, y_bytes.data), ws(saved, cpu, ws_bytes.data);
    forward.execute(queue, {{DNNL_ARG_SRC, x}, {DNNL_ARG_DST, y}, {DNNL_ARG_MEAN, mean}, {DNNL_ARG_VARIANCE, var},
                            {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_SHIFT, beta}, {DNNL_ARG_WORKSPACE, ws}});
    const Freed dx_bytes(data.get_size());
    memory dx(data, cpu, dx_bytes.data);
    // Version 2 counts on the shift here too, though no gradient depends on it.
    backward.execute(queue, {{DNNL_ARG_SRC, x}, {DNNL_ARG_MEAN, mean}, {DNNL_ARG_VARIANCE, var},
                             {DNNL_ARG_DIFF_DST, dy}, {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_SHIFT, beta},
                             {DNNL_ARG_WORKSPACE, ws}, {DNNL_ARG_DIFF_SRC, dx}, {DNNL_ARG_DIFF_SCALE, dgamma},
                             {DNNL_ARG_DIFF_SHIFT, dbeta}});
    queue.wait();
  }
};

}  // namespace

int main() {
  std::cout << DNNL_VERSION_MAJOR << '.' << DNNL_VERSION_MINOR << '.' << DNNL_VERSION_PATCH << std::endl;
  std::unique_ptr<Case> current;
  std::string first;
  while (std::cin >> first) {
    try {
      if (first == "time") {
        int repeats;
        std::cin >> repeats;
        const auto begin = std::chrono::steady_clock::now();
        for (int i = 0; i < repeats; ++i) current->step();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        std::cout << took.count() / repeats << std::endl;
      } else {
        memory::dim c, h, w;
        std::string layout;
        bool relu;
        std::cin >> c >> h >> w >> layout >> relu;
        current = std::make_unique<Case>(memory::dims{std::stol(first), c, h, w}, layout, relu);
        current->step();
        std::cout << "ready" << std::endl;
      }
    } catch (const std::exception& problem) {
      std::cout << "failed: " << problem.what() << std::endl;
    }
  }
}
