#include "dispatch.h"

#include <stdexcept>

namespace bhfast {
namespace {

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet* set : {
#if defined(__x86_64__) && defined(__linux__)
           &amx_set,
#endif
#ifdef __x86_64__
           &avx512bf16_set, &avx512_set, &avx2_set,
#endif
#ifdef __aarch64__
           &neonbf16_set, &neon_set,
#endif
           &portable_set}) {
    if (set->runs_here()) sets.push_back(set);
  }
  return sets;
}

const InstructionSet* current = supported().front();

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : supported()) names.emplace_back(set->name);
  return names;
}

const InstructionSet& find_instruction_set(const std::string& name) {
  std::string names;
  for (const InstructionSet* set : supported()) {
    if (set->name == name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction_set must be one that this machine supports (" + names + "), got '" + name +
                              "'");
}

const InstructionSet& current_instruction_set() { return *current; }

void use_instruction_set(const std::string& name) { current = &find_instruction_set(name); }

}  // namespace bhfast
