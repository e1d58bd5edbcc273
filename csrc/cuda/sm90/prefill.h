// What only GPUs of compute capability 9.0 run.
#pragma once
#include "kernels.h"

namespace lserve::cuda::sm90 {

// Whether it is such a GPU and such a call; else nothing is done.
bool prefill(const PrefillArgs&, void* stream);

}  // namespace lserve::cuda::sm90
