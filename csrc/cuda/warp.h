#pragma once

namespace bhfast::cuda {

constexpr int kWarp = 32;  // threads
constexpr unsigned kAllLanes = 0xffffffff;

}  // namespace bhfast::cuda
