#include "bundle.h"

#include <nnturbo_torch/error.h>
#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

namespace nnturbo_torch {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kSchema = 1;
constexpr std::size_t kChunkBytes = 1 << 20;
constexpr char kPathFile[] = "path.ts";
constexpr char kBuild[] = "`nnturbo build -m MODEL -o BUNDLE --backend torchscript`";

const std::map<std::string, std::string> kNetworkFiles = {{"torchscript", "network.ts"}, {"inductor", "network.pt2"}};

std::string sha256(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Error(file.string() + ": this file of the bundle cannot be read; check its permissions");
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  bool good = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
  std::vector<char> chunk(kChunkBytes);
  while (good && stream) {
    stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    good = EVP_DigestUpdate(context.get(), chunk.data(), static_cast<std::size_t>(stream.gcount())) == 1;
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  good = good && !stream.bad() && EVP_DigestFinal_ex(context.get(), digest.data(), &length) == 1;
  if (!good) throw Error(file.string() + ": its SHA-256 could not be computed; the disk or OpenSSL failed");
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += "0123456789abcdef"[digest[i] >> 4];
    text += "0123456789abcdef"[digest[i] & 15];
  }
  return text;
}

json read_manifest(const fs::path& folder) {
  const fs::path file = folder / "engine.json";
  std::ifstream stream(file);
  if (!stream) {
    throw Error(folder.string() +
                ": a bundle must be a folder with engine.json, and there is none; make a bundle with " + kBuild);
  }
  try {
    return json::parse(stream);
  } catch (const json::exception&) {
    throw Error(file.string() + ": this is not JSON, so the bundle is damaged; copy it again, or build it again");
  }
}

void check_schema(const fs::path& folder, const json& manifest) {
  const int schema = manifest.at("schema").get<int>();
  if (schema > kSchema) {
    throw Error(folder.string() + ": the bundle must have schema " + std::to_string(kSchema) + ", it has schema " +
                std::to_string(schema) + ": a newer nnturbo made it; update this program, or build with the older one");
  }
  if (schema < 1) {
    throw Error(folder.string() + ": the bundle's schema must be " + std::to_string(kSchema) + ", it is " +
                std::to_string(schema) + "; build the bundle again");
  }
}

/// The file of the backend's network; names what to build where this backend has none for C++.
std::string network_file(const fs::path& folder, const std::string& backend) {
  const auto found = kNetworkFiles.find(backend);
  if (found == kNetworkFiles.end()) {
    throw Error(folder.string() + ": in C++ a bundle's backend must be torchscript, inductor or native, this one's is " +
                backend + "; build one with " + kBuild);
  }
  return found->second;
}

void verify_file(const fs::path& folder, const std::string& name, const std::string& expected) {
  // A manifest from elsewhere must not make this program read files outside of the bundle.
  if (name.empty() || name == ".." || name != fs::path(name).filename().string()) {
    throw Error(folder.string() + ": engine.json must name files in the bundle itself, it names " + name +
                "; build the bundle again");
  }
  const fs::path file = folder / name;
  if (!fs::is_regular_file(file)) {
    throw Error(file.string() + ": engine.json names this file, and it is not there; copy the whole bundle again");
  }
  const std::string found = sha256(file);
  if (found != expected) {
    throw Error(file.string() + ": its SHA-256 must be " + expected + ", it is " + found +
                ": the file was changed or cut off; copy the bundle again, or build it again");
  }
}

Bundle parse(const fs::path& folder, const json& manifest) {
  check_schema(folder, manifest);
  const auto backend = manifest.at("backend").get<std::string>();
  if (backend == NATIVE) return {folder, {}, backend, "cpu", {}, {}, {}};
  const std::string network = network_file(folder, backend);
  const auto files = manifest.at("files").get<std::map<std::string, std::string>>();
  for (const std::string& needed : {network, std::string(kPathFile)}) {
    if (files.count(needed) == 0) {
      throw Error(folder.string() + ": engine.json must name " + needed +
                  " for C++, and does not; build the bundle again with " + kBuild);
    }
  }
  for (const auto& [name, expected] : files) verify_file(folder, name, expected);
  const json& machine = manifest.at("machine");
  return {folder / network,
          folder / kPathFile,
          backend,
          machine.at("device").get<std::string>(),
          machine.at("architecture").get<std::string>(),
          machine.value("cpu", ""),
          manifest.value("versions", json::object()).value("torch", "")};
}

}  // namespace

Bundle read_bundle(const fs::path& folder) {
  const json manifest = read_manifest(folder);
  try {
    return parse(folder, manifest);
  } catch (const json::exception& error) {
    throw Error((folder / "engine.json").string() +
                ": schema, backend, files and machine must be there in the form that nnturbo writes (" + error.what() +
                "); build the bundle again");
  } catch (const fs::filesystem_error& error) {
    throw Error(std::string(error.what()) + ": the bundle must be readable; check its permissions");
  }
}

}  // namespace nnturbo_torch
