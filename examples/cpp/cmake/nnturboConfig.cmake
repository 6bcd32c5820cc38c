include(CMakeFindDependencyMacro)
find_dependency(Torch)
find_dependency(OpenSSL COMPONENTS Crypto)
include("${CMAKE_CURRENT_LIST_DIR}/nnturboTargets.cmake")
