#include "bundle.h"

#include <map>

#include "error.h"
#include "json.h"
#include "mapped_file.h"
#include "program_network.h"
#include "sha256.h"

namespace nnturbo {
namespace {

constexpr int SCHEMA = 1;
constexpr char MANIFEST[] = "engine.json", PATH[] = "path.json", PROGRAM[] = "network.json";
constexpr char WEIGHTS[] = "weights.safetensors";
constexpr char BUILD[] = "`nnturbo build -m MODEL -o BUNDLE --backend native`";

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw Error(NNTURBO_BAD_BUNDLE, where + ": " + what);
}

// The files of a bundle that its manifest names, each verified.
class Files {
 public:
  explicit Files(const std::string& folder) : folder_(folder) {
    if (!is_file(in_folder(MANIFEST)))
      fail(folder, std::string("a bundle must be a folder with engine.json, and there is none; make one with ") + BUILD);
    try {
      read(Json::parse(MappedFile(in_folder(MANIFEST)).text()));
    } catch (const Json::exception& error) {
      fail(in_folder(MANIFEST), std::string("it must have the form that nnturbo writes (") + error.what() +
                                    "); copy the bundle again, or build it again");
    }
  }

  const MappedFile& operator[](const std::string& name) const {
    const auto found = files_.find(name);
    if (found == files_.end())
      fail(folder_, "engine.json must name " + name + " for this library, and does not: " +
                        (name == PATH ? "only Python can run this model" : "build the bundle again with ") +
                        (name == PATH ? "" : BUILD));
    return found->second;
  }

 private:
  void read(const Json& manifest) {
    const Json& schema = manifest.at("schema");
    if (schema != SCHEMA)
      fail(folder_, "the bundle must have schema " + std::to_string(SCHEMA) + ", it has schema " + schema.dump() +
                        ": update this program, or build the bundle again");
    const auto backend = manifest.at("backend").get<std::string>();
    if (backend != "native")
      fail(folder_, "the backend of a bundle for this library must be native, this one's is " + backend +
                        "; build one with " + BUILD);
    for (const auto& [name, expected] : manifest.at("files").get<std::map<std::string, std::string>>())
      add(name, expected);
  }

  void add(const std::string& name, const std::string& expected) {
    // A manifest from elsewhere must not make this program read files outside of the bundle.
    if (name.empty() || name == "." || name == ".." || name.find_first_of("/\\:") != std::string::npos)
      fail(folder_, "engine.json must name files in the bundle itself, it names " + name + "; build the bundle again");
    const MappedFile& file = files_.emplace(name, MappedFile(in_folder(name))).first->second;
    const std::string found = sha256(file.data(), file.size());
    if (found != expected)
      fail(in_folder(name), "its SHA-256 must be " + expected + ", it is " + found +
                                ": the file was changed or cut off; copy the bundle again, or build it again");
  }

  std::string in_folder(const std::string& name) const { return folder_ + "/" + name; }

  const std::string folder_;
  std::map<std::string, MappedFile> files_;
};

}  // namespace

Bundle open_bundle(const std::string& folder) {
  const Files files(folder);
  Bundle bundle;
  bundle.plan = parse_plan(files[PATH].text());
  bundle.network = read_network(files[PROGRAM].text(), files[WEIGHTS], bundle.plan);
  return bundle;
}

}  // namespace nnturbo
