// driver.cpp: runs the ops' C++ entry points on arrays from stdin and writes what they return to stdout.
//
// A call is lines of text, arrays followed by their bytes (calls.py writes it):
//   call OP NAME, integer NAME VALUE, real NAME VALUE, input NAME BYTES SHIFT, output NAME BYTES, ..., run
// The answer to each: output NAME BYTES with the bytes, ..., done. After the last one kernel LAUNCHES NAME, ..., end.
// Arrays begin SHIFT bytes after a multiple of 16. Whatever fails ends the program with a line on stderr that names the call.
#include <iostream>
#include <map>
#include <memory>

#include "completion.h"
#include "machine.h"
#include "three_factor.h"

namespace {

using machine::Array;

struct Call {
  std::string op, name;
  std::map<std::string, int64_t> integers;
  std::map<std::string, double> reals;
  std::map<std::string, std::unique_ptr<Array>> arrays;
  std::vector<std::pair<std::string, size_t>> outputs;

  int64_t integer(const std::string& key) const { return integers.at(key); }
  template <typename T>
  T* array(const std::string& key) const {  // null where the call does not have it
    const auto found = arrays.find(key);
    return found == arrays.end() ? nullptr : static_cast<T*>(found->second->data());
  }
};

bool read_call(std::istream& in, Call& call) {
  std::string word, name, value;
  while (in >> word && word != "run") {
    in >> name;
    if (word == "call") {
      call.op = name;
      in >> call.name;
      machine::begin(call.name);
    } else if (word == "integer") {
      in >> call.integers[name];
    } else if (word == "real") {
      in >> value;
      call.reals[name] = std::stod(value);  // exact: in hexadecimal
    } else if (word == "input" || word == "output") {
      size_t bytes = 0, shift = 0;
      in >> bytes;
      if (word == "input") in >> shift;
      auto& array = call.arrays[name] = std::make_unique<Array>(name, bytes, 16, shift);
      if (word == "input") {
        std::vector<char> host(bytes);
        in.get();  // the end of the line
        in.read(host.data(), std::streamsize(bytes));
        array->fill_and_protect(host.data());
      } else {
        call.outputs.emplace_back(name, bytes);
      }
    } else {
      throw std::runtime_error("driver: no word " + word);
    }
  }
  return bool(in);
}

void require_undamaged(Array& array) {
  const std::string damage = array.damage();
  if (!damage.empty()) throw std::runtime_error(damage);
}

void require_success() {
  const std::string error = machine::finish();
  if (!error.empty()) throw std::runtime_error(error);
}

// ---- the ops

template <typename T, typename I>
void run_completion(const Call& call) {
  lrk::CompletionPass<T, I> p = {};
  p.own_count = call.integer("own_count");
  p.other_count = call.integer("other_count");
  p.entry_count = call.integer("entry_count");
  p.width = call.integer("width");
  p.offsets = call.array<int64_t>("offsets");
  p.other_index = call.array<I>("other_index");
  p.values = call.array<T>("values");
  p.weights = call.array<T>("weights");
  p.own = call.array<T>("own");
  p.other = call.array<T>("other");
  p.own_bias = call.array<T>("own_bias");
  p.other_bias = call.array<T>("other_bias");
  p.offset = T(call.reals.at("offset"));
  p.plan = call.array<int64_t>("plan");
  p.plan_size = call.integer("plan_size");
  p.long_count = call.integer("long_count");
  p.long_row = call.integer("long_row");
  p.own_grad = call.array<T>("own_grad");
  p.own_bias_grad = call.array<T>("own_bias_grad");
  p.own_loss = call.array<T>("own_loss");
  T* const loss = call.array<T>("loss");
  Array workspace("workspace", size_t(lrk::completion_cuda_workspace(p, loss != nullptr)), 16, 0);
  lrk::completion_pass_cuda(p, workspace.data(), loss, nullptr);
  require_success();
  require_undamaged(workspace);
}

// Forward, then backward if there is a dy, with the z that forward has saved.
void run_three_factor(const Call& call) {
  lrk::ThreeFactor p = {};
  p.tokens = call.integer("tokens");
  p.in_features = call.integer("in_features");
  p.out_features = call.integer("out_features");
  p.rank = call.integer("rank");
  p.depth = call.integer("depth");
  p.type = lrk::DType(call.integer("type"));
  p.factor_type = lrk::DType(call.integer("factor_type"));
  p.x = call.array<void>("x");
  p.x_stride = call.integer("x_stride");
  p.left = call.array<void>("left");
  p.core = call.array<void>("core");
  p.right = call.array<void>("right");
  p.scale = call.reals.at("scale");
  p.shift = call.reals.at("shift");
  p.drop_threshold = int32_t(call.integer("drop_threshold"));
  p.seed = call.array<int64_t>("seed");

  lrk::ThreeFactorForward forward = {};
  static_cast<lrk::ThreeFactor&>(forward) = p;
  forward.bias = call.array<void>("bias");
  forward.y = call.array<void>("y");
  forward.z = call.array<void>("z");
  Array forward_workspace("workspace of forward", size_t(lrk::three_factor_cuda_workspace(p, false)), 256, 0);
  lrk::three_factor_forward_cuda(forward, forward_workspace.data(), nullptr);
  require_success();
  require_undamaged(forward_workspace);
  if (!call.integer("backward")) return;

  lrk::ThreeFactorBackward backward = {};
  static_cast<lrk::ThreeFactor&>(backward) = p;
  backward.dy = call.array<void>("dy");
  backward.dy_stride = call.integer("dy_stride");
  backward.z = forward.z;
  backward.dx = call.array<void>("dx");
  backward.dleft = call.array<void>("dleft");
  backward.dcore = call.array<void>("dcore");
  backward.dright = call.array<void>("dright");
  Array backward_workspace("workspace of backward", size_t(lrk::three_factor_cuda_workspace(p, true)), 256, 0);
  lrk::three_factor_backward_cuda(backward, backward_workspace.data(), nullptr);
  require_success();
  require_undamaged(backward_workspace);
}

void run(const Call& call) {
  if (call.op == "three_factor") return run_three_factor(call);
  if (call.op != "completion") throw std::runtime_error("driver: no op " + call.op);
  const bool wide = call.integer("wide_index");
  if (call.integer("double"))
    wide ? run_completion<double, int64_t>(call) : run_completion<double, int32_t>(call);
  else
    wide ? run_completion<float, int64_t>(call) : run_completion<float, int32_t>(call);
}

}  // namespace

int main(int argc, char** argv) {
  std::string name = "none";
  try {
    machine::start(argc, argv);
    std::ios::sync_with_stdio(false);
    for (;;) {
      Call call;
      if (!read_call(std::cin, call)) break;
      name = call.name;
      run(call);
      for (const auto& [output, bytes] : call.outputs) {
        Array& array = *call.arrays.at(output);
        require_undamaged(array);
        std::vector<char> host(bytes);
        array.read(host.data());
        std::cout << "output " << output << ' ' << bytes << '\n';
        std::cout.write(host.data(), std::streamsize(bytes));
      }
      std::cout << "done\n" << std::flush;
    }
    for (const auto& kernel : machine::kernels()) std::cout << "kernel " << kernel.launches << ' ' << kernel.name << '\n';
    std::cout << "end\n";
  } catch (const std::exception& error) {
    std::cerr << "driver: " << error.what() << ", in call " << name << '\n';
    return 2;
  }
  return 0;
}
