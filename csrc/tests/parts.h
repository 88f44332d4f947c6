// The parts of the driver, and what they share: comparisons that are counted, and pieces of work that run at the same time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

// Each runs kernels of the chosen instruction set and compares what they give with plain loops in double.
void check_layers();         // layers.cpp
void check_preprocessing();  // preprocessing.cpp
void check_products();       // products.cpp
void check_halves();         // halves.cpp

inline int threads = 1;
inline int64_t compared = 0, wrong = 0;

// Within `allowed`, if it is finite; the same infinity or any NaN otherwise.
inline void expect_close(const char* what, double ours, double exact, double allowed) {
  ++compared;
  if (ours == exact || std::abs(ours - exact) <= allowed || (std::isnan(ours) && std::isnan(exact))) return;
  if (++wrong <= 20) std::printf("%s: %.9g, expected %.9g +- %.2g\n", what, ours, exact, allowed);
}

// Runs work(piece, its number), at the same time where there are threads.
template <class Piece, class Work>
void for_each_piece(const std::vector<Piece>& pieces, Work work) {
  if (threads == 1) {
    for (size_t i = 0; i < pieces.size(); ++i) work(pieces[i], i);
    return;
  }
  std::vector<std::thread> pool;
  for (size_t i = 0; i < pieces.size(); ++i) pool.emplace_back([&, i] { work(pieces[i], i); });
  for (std::thread& each : pool) each.join();
}
