// Prints a photo's probabilities and classes, the most probable first, by a model that `fastcnn export` wrote:
//   classify MODEL.torchscript PHOTO.ppm

#include <torch/script.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// Returns (1, height, width, 3) uint8: the pixels of a binary PPM file, which are RGB bytes behind a line of text.
torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, white = 0;
  file >> kind >> width >> height >> white;
  file.get();
  if (!file || kind != "P6" || width < 1 || height < 1 || white != 255) {
    throw std::runtime_error(path + " is no binary PPM file of 8 bits; README.md says how to make one");
  }
  torch::Tensor pixels = torch::empty({1, height, width, 3}, torch::kUInt8);
  file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
  if (file.gcount() != pixels.numel()) {
    throw std::runtime_error(path + " is truncated");
  }
  return pixels;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: classify MODEL.torchscript PHOTO.ppm\n");
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    torch::jit::Module model = torch::jit::load(argv[1]);
    const auto classes = model.attr("classes").toList();
    // The model resizes, normalises and applies softmax itself: (1, height, width, 3) uint8 -> (1, classes) fp32.
    const torch::Tensor probabilities = model.forward({read_ppm(argv[2])}).toTensor()[0].contiguous();

    std::vector<std::pair<float, std::string>> lines;
    for (size_t i = 0; i < classes.size(); ++i) {
      lines.emplace_back(probabilities.data_ptr<float>()[i], classes.get(i).toStringRef());
    }
    std::stable_sort(lines.begin(), lines.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& [probability, name] : lines) {
      std::printf("%.7f  %s\n", probability, name.c_str());
    }
  } catch (const std::exception& error) {
    const std::string message = error.what();  // torch adds its own call stack, line by line
    std::fprintf(stderr, "classify: error: %s\n", message.substr(0, message.find('\n')).c_str());
    return 1;
  }
  return 0;
}
