# Finds torch's headers and libtorch_cpu, in CMAKE_PREFIX_PATH or in the Python environment.
#
# find_package(Torch) is left out on purpose: it adds compile flags and, in a CUDA torch, asks for a CUDA toolkit;
# the stable interface needs one include folder and one library.
#
# Sets TENSORCOMP_TORCH_INCLUDE_DIRS, TENSORCOMP_TORCH_LIBRARY_DIR, TENSORCOMP_TORCH_CPU_LIBRARY.
find_path(TENSORCOMP_TORCH_INCLUDE_DIR torch/csrc/stable/library.h PATH_SUFFIXES include)
if(NOT TENSORCOMP_TORCH_INCLUDE_DIR)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import os, torch; print(os.path.dirname(torch.__file__), end='')"
    OUTPUT_VARIABLE TENSORCOMP_TORCH_ROOT RESULT_VARIABLE TENSORCOMP_TORCH_STATUS ERROR_QUIET)
  if(NOT TENSORCOMP_TORCH_STATUS EQUAL 0)
    message(FATAL_ERROR "torch >= 2.10 was not found: set CMAKE_PREFIX_PATH to a LibTorch, or Python3_EXECUTABLE to a "
                        "Python that has torch (found ${Python3_EXECUTABLE}, which has none)")
  endif()
  find_path(TENSORCOMP_TORCH_INCLUDE_DIR torch/csrc/stable/library.h
    PATHS ${TENSORCOMP_TORCH_ROOT}/include NO_DEFAULT_PATH REQUIRED)
endif()
get_filename_component(TENSORCOMP_TORCH_PREFIX ${TENSORCOMP_TORCH_INCLUDE_DIR} DIRECTORY)
find_library(TENSORCOMP_TORCH_CPU_LIBRARY torch_cpu PATHS ${TENSORCOMP_TORCH_PREFIX}/lib NO_DEFAULT_PATH REQUIRED)
find_library(TENSORCOMP_C10_LIBRARY c10 PATHS ${TENSORCOMP_TORCH_PREFIX}/lib NO_DEFAULT_PATH REQUIRED)
get_filename_component(TENSORCOMP_TORCH_LIBRARY_DIR ${TENSORCOMP_TORCH_CPU_LIBRARY} DIRECTORY)
set(TENSORCOMP_TORCH_INCLUDE_DIRS
  ${TENSORCOMP_TORCH_INCLUDE_DIR} ${TENSORCOMP_TORCH_INCLUDE_DIR}/torch/csrc/api/include)
message(STATUS "torch: ${TENSORCOMP_TORCH_PREFIX}")
