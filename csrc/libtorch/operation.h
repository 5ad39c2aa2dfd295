// C++ functions as kernels of torch's operations.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace bhfast {

// The value of an argument, which torch hands over: whoever takes it owns it.
template <class T>
struct Argument {
  static T take(StableIValue value) {
    static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, double>);
    T result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }
};

template <class Handle>
Handle as_handle(StableIValue value) {
  return reinterpret_cast<Handle>(static_cast<uintptr_t>(value));
}

template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(as_handle<AtenTensorHandle>(value)); }
};

template <>
struct Argument<std::string> {
  static std::string take(StableIValue value) {
    const auto handle = as_handle<StringHandle>(value);
    const auto* text = ask_torch<const char*>(torch_string_c_str, handle);
    std::string result(text, ask_torch<size_t>(torch_string_length, handle));
    check_torch(torch_delete_string(handle));
    return result;
  }
};

template <class T>
struct Argument<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> inner(as_handle<StableIValue*>(value));  // torch has allocated it with `new`
    return inner ? std::optional<T>(Argument<T>::take(*inner)) : std::nullopt;
  }
};

template <class T>
struct Argument<std::vector<T>> {
  static std::vector<T> take(StableIValue value) {
    const auto handle = as_handle<StableListHandle>(value);
    std::vector<T> result;
    const auto size = ask_torch<size_t>(torch_list_size, handle);
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      result.push_back(Argument<T>::take(ask_torch<StableIValue>(torch_list_get_item, handle, i)));
    }
    check_torch(torch_delete_list(handle));
    return result;
  }
};

template <class... T>
void return_tensors(StableIValue* stack, T&&... tensors) {
  ((*stack++ = reinterpret_cast<uintptr_t>(tensors.release())), ...);
}

// What torch calls: takes the arguments from the stack, and leaves the results there.
template <auto function>
struct Kernel;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Kernel<function> {
  static void run(StableIValue* stack, uint64_t, uint64_t) { run(stack, std::index_sequence_for<Parameters...>()); }

 private:
  template <size_t... I>
  static void run(StableIValue* stack, std::index_sequence<I...>) {
    // braces: evaluated in this order
    std::tuple<std::decay_t<Parameters>...> arguments{Argument<std::decay_t<Parameters>>::take(stack[I])...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments);
    } else {
      std::apply([&](auto&&... tensors) { return_tensors(stack, tensors...); }, std::apply(function, arguments));
    }
  }
};

// Registers kernels for a dispatch key. The library object lives as long as the process.
class Kernels {
 public:
  Kernels(const char* library, const char* key) {
    handle_ = ask_torch<TorchLibraryHandle>(aoti_torch_library_init_impl, library, key, __FILE__, uint32_t{__LINE__});
  }

  template <auto function>
  Kernels& add(const char* operation) {
    check_torch(torch_library_impl(handle_, operation, &Kernel<function>::run, kStableAbi));
    return *this;
  }

 private:
  TorchLibraryHandle handle_;
};

}  // namespace bhfast
