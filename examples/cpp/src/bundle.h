#pragma once

#include <filesystem>
#include <string>

namespace nnturbo_torch {

constexpr char NATIVE[] = "native";

/// What a bundle's manifest says about how and where its network runs.
struct Bundle {
  std::filesystem::path network;  ///< File of the network; the folder for native bundles.
  std::filesystem::path path;     ///< File of what lies between a scan and the network.
  std::string backend;            ///< "torchscript", "inductor" or "native".
  std::string device;             ///< "cpu" or "cuda".
  std::string architecture;       ///< Of the machine it was built on, such as "x86_64".
  std::string cpu;                ///< Widest vector instructions there, such as "AVX512"; empty for CUDA.
  std::string torch_version;      ///< That built it, such as "2.13.0+cpu"; empty where the manifest does not say.
};

/// Reads `engine.json` and compares every file it names with its SHA-256, which libnnturbo does for native bundles.
///
/// @throws Error  Where something is missing or damaged, or needs a newer nnturbo or another backend.
Bundle read_bundle(const std::filesystem::path& folder);

}  // namespace nnturbo_torch
